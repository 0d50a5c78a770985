"""Runs with label smoothing, z-loss, dropout and skipped updates, started and resumed, with the eager twin."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.apps.test_train_llm import losses, metrics, run
from tests.apps.test_train_llm_workers import job

RECIPE = {
    "model.residual_dropout": "0.1",
    "model.attention_dropout": "0.1",
    "model.embedding_dropout": "0.1",
    "training.label_smoothing": "0.1",
    "training.z_loss": "1e-3",
}


def test_the_loss_stays_comparable_and_the_objective_stands_beside_it(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, model__dtype="float64") == 0
    assert ", Objective: " not in capsys.readouterr().out
    changes = {"training__label_smoothing": "0.1", "training__z_loss": "1e-3"}
    assert run(settings, model__dtype="float64", training__output_dir=str(tmp_path / "terms"), **changes) == 0
    assert capsys.readouterr().out.count(", Objective: ") == 4
    plain, terms = metrics(tmp_path / "out"), metrics(tmp_path / "terms")
    assert {row["Objective"] for row in plain} == {""}
    assert terms[0]["Step Loss"] == plain[0]["Step Loss"]
    assert all(float(row["Objective"]) > float(row["Step Loss"]) for row in terms)
    assert losses(tmp_path / "terms")[1:] != losses(tmp_path / "out")[1:]


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(settings: dict[str, str], tmp_path: Path) -> None:
    settings = settings | RECIPE | {"schedule": "cosine", "schedule.warmup_steps": "2"}
    assert run(settings) == 0
    legs = {"training__output_dir": str(tmp_path / "legs"), "checkpoint__save": "true", "training__resume": "auto"}
    for _ in range(2):
        assert run(settings, checkpoint__num_steps="2", training__overwrite_output_dir="true", **legs) in (0, 130)
    assert losses(tmp_path / "legs") == losses(tmp_path / "out")
    assert [row["Objective"] for row in metrics(tmp_path / "legs")] == [
        row["Objective"] for row in metrics(tmp_path / "out")
    ]
    whole, resumed = (tmp_path / name / "model.safetensors" for name in ("out", "legs"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_microbatches_of_a_row_have_the_masks_of_the_whole_batch(settings: dict[str, str], tmp_path: Path) -> None:
    settings = settings | RECIPE | {"model.dtype": "float64"}
    assert run(settings) == 0
    cut = {"training__batch_size": "1", "training__gradient_accumulation_steps": "4"}
    assert run(settings, training__output_dir=str(tmp_path / "cut"), **cut) == 0
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "out"), rel=1e-12)


def test_updates_that_are_not_finite_are_skipped_and_too_many_end_the_run_with_the_last_good_weights(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exploding = {"optimizer.lr": "1e30", "training.max_steps": "20", "training.max_nonfinite_steps": "3"}
    settings = settings | exploding | {"checkpoint.save": "true", "training.max_grad_norm": "null"}
    assert run(settings) == 1
    out, error = capsys.readouterr()
    assert error.splitlines()[-1].startswith("error: The loss or a gradient was NaN or infinite in 3 steps in a row")
    rows = metrics(tmp_path / "out")
    skipped = [int(row["Skipped"]) for row in rows]
    assert skipped == [0] * (len(rows) - 3) + [1] * 3
    assert out.count(", Update skipped: not finite") == 3
    assert f"iter_{len(rows)}/" in out
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    # started again, it goes on from what was saved, counts those before, and ends with the next
    assert run(settings, training__resume="auto", training__overwrite_output_dir="true") == 1
    assert "in 4 steps in a row" in capsys.readouterr().err
    assert [row["Skipped"] for row in metrics(tmp_path / "out")] == [str(flag) for flag in [*skipped, 1]]
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_run_that_could_skip_and_need_not_has_the_bits_of_one_that_cannot(
    settings: dict[str, str], tmp_path: Path
) -> None:
    assert run(settings, training__max_grad_value="0.01") == 0
    able = {"training__max_nonfinite_steps": "1", "training__output_dir": str(tmp_path / "able")}
    assert run(settings, training__max_grad_value="0.01", **able) == 0
    assert losses(tmp_path / "able") == losses(tmp_path / "out")
    plain, able_ = (tmp_path / name / "model.safetensors" for name in ("out", "able"))
    assert plain.read_bytes() == able_.read_bytes()
    assert {row["Skipped"] for row in metrics(tmp_path / "able")} == {"0"}
    assert run(settings, training__output_dir=str(tmp_path / "free")) == 0
    assert losses(tmp_path / "free")[1:] != losses(tmp_path / "out")[1:]


@pytest.mark.slow
def test_two_workers_have_the_masks_and_objectives_of_one_process(settings: dict[str, str], tmp_path: Path) -> None:
    given = (
        settings | RECIPE | {"model.dtype": "float64", "training.batch_size": "2", "training.global_batch_size": "8"}
    )
    given |= {"training.max_nonfinite_steps": "3", "training.max_grad_value": "0.01"}
    assert run(given, training__output_dir=str(tmp_path / "one")) == 0
    done = job("mpich", 2, given)
    assert done.returncode == 0, done.stderr
    for column in ("Step Loss", "Objective", "Skipped"):
        ours, theirs = ([float(row[column]) for row in metrics(tmp_path / name)] for name in ("out", "one"))
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.slow
def test_two_workers_end_together_over_skipped_updates(settings: dict[str, str], tmp_path: Path) -> None:
    exploding = {"optimizer.lr": "1e30", "training.max_steps": "20", "training.max_nonfinite_steps": "2"}
    done = job("mpich", 2, settings | exploding | {"training.batch_size": "2", "training.max_grad_norm": "null"})
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "NaN or infinite in 2 steps in a row" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
