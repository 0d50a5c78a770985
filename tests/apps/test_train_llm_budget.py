"""A run as long as its budget of tokens says, however it is split over workers and starts."""

from pathlib import Path

import pytest

from apps.training.step_plan import plan_step
from tests.apps.test_train_llm import losses, metrics, run
from tests.apps.test_train_llm_workers import job
from tests.apps.training.plans import settings_of, write_config

# The tiny model has two tables of 300×32, two blocks of 7,744 (q and o 1,024, k and v 512, three of 1,536 in the MLP,
# two norms of 32) and a last norm: 34,720 parameters. A fiftieth of them is 694.4.
BUDGET = {"training__token_budget": "2*N/100", "training__max_steps": "null"}
LINE = "Token budget: 2*N/100 = 695 tokens → 6 steps of 128 tokens"


def test_the_model_is_as_large_as_counted_by_hand(tmp_path: Path) -> None:
    shape = {"vocab_size": 300, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    for tied, tables in ((False, 2 * 9600), (True, 9600)):
        plan = plan_step(settings_of(write_config(tmp_path / f"tied-{tied}", tie_word_embeddings=tied, **shape)))
        assert plan.sizes == {"N": tables + 15_520, "N_non_embedding": 15_520}


def test_a_budget_makes_the_steps_and_is_told(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, **BUDGET) == 0
    assert len(losses(tmp_path / "out")) == 6  # ⌈695 / (4 rows × 32)⌉
    assert LINE in capsys.readouterr().out.splitlines()
    assert LINE in (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert "token_budget: 2*N/100\n" in (tmp_path / "out" / "config.yaml").read_text()


def test_accumulation_counts_and_a_budget_beyond_the_data_takes_more_epochs(
    settings: dict[str, str], tmp_path: Path
) -> None:
    more = {"training__gradient_accumulation_steps": "2", "training__token_budget": "10000"}
    assert run(settings, **BUDGET | more) == 0
    rows = metrics(tmp_path / "out")
    assert len(rows) == 40  # ⌈10,000 / 256⌉
    assert int(rows[-1]["Epoch"]) > 1


def test_a_budget_is_taken_over_by_what_goes_on(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = BUDGET | {"training__output_dir": str(tmp_path / "whole")}
    assert run(settings, **whole) == 0
    first = BUDGET | {"checkpoint__save": "true", "checkpoint__num_steps": "2"}
    assert run(settings, **first) == 0
    del settings["training.max_steps"]
    assert run(settings, checkpoint__save="true", training__resume="auto") == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    capsys.readouterr()
    assert run(settings, training__resume="auto", training__token_budget="3*N/100") == 2
    assert "training.token_budget | 2*N/100    | 3*N/100" in capsys.readouterr().err


@pytest.mark.slow
def test_another_number_of_workers_goes_on_to_the_same_step(settings: dict[str, str], tmp_path: Path) -> None:
    whole = BUDGET | {"training__output_dir": str(tmp_path / "whole")}
    assert run(settings, **whole) == 0
    assert run(settings, **BUDGET, checkpoint__save="true", checkpoint__num_steps="2") == 0
    settings["training.batch_size"] = "2"
    changes = BUDGET | {"training__resume": "auto", "training__global_batch_size": "4"}
    done = job("mpich", 2, settings, **changes, checkpoint__save="true", checkpoint__overwrite_config="true")
    assert done.returncode == 0, done.stderr
    assert LINE in done.stdout.splitlines()
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
