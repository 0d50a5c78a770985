"""`logging.stats_every` from end to end with the eager twin: what is reported, and that a resume changes no number."""

import csv
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from apps.train_llm import program
from apps.training.cli import run_main
from tests.apps.test_train_llm_workers import job


def run(settings: dict[str, str], **changes: str) -> int:
    changed = settings | {key.replace("__", "."): value for key, value in changes.items()}
    return run_main(program, [f"{key}={value}" for key, value in changed.items()])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


MEASURED = {"logging__records_per_second": "1e6", "training__max_steps": "6", "training__evaluate": "false"}
OF_TIME = ("seconds", "share", "tokens_per_second", "steps_per_second", "samples_per_second")


def numbers(row: dict[str, str]) -> dict[str, float]:
    """All that the clock has no part in."""
    return {name: float(text) for name, text in row.items() if text and not name.startswith(OF_TIME)}


def test_statistics_come_every_so_many_steps_with_running_sums(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(settings, logging__stats_every="2", **MEASURED) == 0
    rows = table(tmp_path / "out")  # to csv, since nobody else was named
    assert [bool(row["grad_l2/all"]) for row in rows] == [False, True] * 3
    losses = [float(row["loss"]) for row in rows]
    dots = cosines = changes = 0.0
    for row in rows[1::2]:
        found = {name: float(text) for name, text in row.items() if text}
        step = int(row["step"])
        assert found["grad_l2/all"] == pytest.approx(found["grad_norm"], rel=1e-5)
        assert found["loss_change"] == losses[step - 1] - losses[step - 2]
        changes += found["loss_change"]
        dots += found["dot_last_update/all"]
        cosines += found["cos_last_grad/all"]
        assert found["sum_loss_change"] == pytest.approx(changes)
        assert found["sum_dot_last_update/all"] == pytest.approx(dots)
        assert found["sum_cos_last_grad/all"] == pytest.approx(cosines)
        assert -1 <= found["cos_last_update/all"] <= 1
        assert 0 <= found["accuracy"] <= 1
        assert found["grad_nonfinite/all"] == 0
        parts = [name.partition("/")[2] for name in found if name.startswith("param_l1/")]
        assert parts == ["all", "embed_tokens", "layers.0", "layers.1", "norm", "lm_head"]
        for kind in ("param", "grad", "update"):
            l1, l2, linf = ([found[f"{kind}_{norm}/{part}"] for part in parts] for norm in ("l1", "l2", "linf"))
            assert l1[0] == pytest.approx(sum(l1[1:]), rel=1e-6)
            assert l2[0] == pytest.approx(math.hypot(*l2[1:]), rel=1e-6)
            assert linf[0] == max(linf[1:])
        shares = [value for name, value in found.items() if name.startswith("share/")]
        assert sum(shares) == pytest.approx(1.0, abs=0.01)
        assert {"share/data", "share/forward", "share/backward", "share/update"} <= found.keys()


def test_the_norm_of_the_last_update_and_parameters_are_those_of_the_weights_that_were_saved(
    settings: dict[str, str], tmp_path: Path
) -> None:
    saving = {"checkpoint__save": "true", "checkpoint__save_steps": "1"}
    assert run(settings, logging__stats_every="1", logging__stats_by="parameter", **saving, **MEASURED) == 0
    *_, row = table(tmp_path / "out")
    before, after = (load_file(tmp_path / f"out/checkpoints/iter_{step}/model.safetensors") for step in (5, 6))
    for name, weight in before.items():
        assert float(row[f"param_l1/{name}"]) == pytest.approx(weight.double().abs().sum().item(), rel=1e-5)
        update = after[name].double() - weight.double()
        assert float(row[f"update_l2/{name}"]) == pytest.approx(update.norm().item(), rel=1e-5)


@pytest.mark.parametrize("stop", ["3", "4"])
def test_a_resumed_run_reports_the_same_numbers(settings: dict[str, str], tmp_path: Path, stop: str) -> None:
    given = MEASURED | {"logging__stats_every": "2", "checkpoint__save": "true", "training__resume": "auto"}
    assert run(settings, **given) == 0
    whole = [numbers(row) for row in table(tmp_path / "out")]
    legs = given | {"training__output_dir": str(tmp_path / "legs")}
    assert run(settings, checkpoint__num_steps=stop, **legs) == 0
    assert run(settings, **legs) == 0
    assert [numbers(row) for row in table(tmp_path / "legs")] == whole


def test_statistics_begun_in_the_middle_of_a_run_leave_out_what_is_not_known(
    settings: dict[str, str], tmp_path: Path
) -> None:
    given = MEASURED | {"checkpoint__save": "true", "training__resume": "auto", "logging__report_to": "[csv]"}
    assert run(settings, checkpoint__num_steps="3", **given) == 0
    assert run(settings, logging__stats_every="1", **given) == 0
    first, second, _ = table(tmp_path / "out")[3:]
    assert first["loss_change"]
    assert not first["dot_last_grad/all"]
    assert second["dot_last_grad/all"]


def test_groups_of_the_optimizer_and_nothing_when_off(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(settings, logging__stats_every="3", logging__stats_by="group", **MEASURED) == 0
    names = [name for name in table(tmp_path / "out")[0] if name.startswith("grad_l2/")]
    assert names == ["grad_l2/all", "grad_l2/0-adamw", "grad_l2/1-adamw"]
    assert run(settings, logging__report_to="[csv]", training__output_dir=str(tmp_path / "off"), **MEASURED) == 0
    assert not [name for name in table(tmp_path / "off")[0] if "/" in name]


@pytest.mark.slow
def test_two_workers_report_the_numbers_of_one_and_only_the_first_reports(
    settings: dict[str, str], tmp_path: Path
) -> None:
    given = settings | {"training.batch_size": "2", "training.global_batch_size": "4", "logging.stats_every": "2"}
    assert run(given, training__output_dir=str(tmp_path / "one"), **MEASURED) == 0
    done = job("mpich", 2, given, **MEASURED)
    assert done.returncode == 0, done.stderr
    assert len(table(tmp_path / "out")) == 6  # a row a step, not one from each worker
    for ours, theirs in zip(table(tmp_path / "out"), table(tmp_path / "one"), strict=True):
        expected = numbers(theirs)
        assert numbers(ours).keys() == expected.keys()
        for name, value in numbers(ours).items():
            # inner products are small beside the lengths of their sides; Adam magnifies the rounding of tiny gradients
            assert value == pytest.approx(expected[name], rel=2e-3, abs=2e-4), (ours["step"], name)


def test_a_skipped_update_is_none_and_what_was_not_finite_is_counted(settings: dict[str, str], tmp_path: Path) -> None:
    explode = {"optimizer__lr": "1e30", "training__max_grad_norm": "null", "training__max_nonfinite_steps": "2"}
    assert run(settings, logging__stats_every="1", **explode, **MEASURED) == 1
    *_, row = table(tmp_path / "out")
    assert float(row["grad_nonfinite/all"]) > 0
    assert float(row["update_l1/all"]) == 0.0
    assert not math.isfinite(float(row["grad_l2/all"]))
    assert math.isfinite(float(row["sum_dot_last_grad/all"]))
