"""Runs of the program that save and go on: legs, lists of steps, what is left after a kill at the very end."""

import csv
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from apps.train_llm import program
from backends.errors import UserError


def run(settings: dict[str, str], **more: str) -> int:
    """Start the program with `settings`; in `more` a dot is written as two underscores."""
    given = settings | {name.replace("__", "."): value for name, value in more.items()}
    return program([f"{name}={value}" for name, value in given.items()])


def saved(settings: dict[str, str]) -> list[str]:
    folder = Path(settings["training.output_dir"], "checkpoints")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def weights(folder: Path) -> dict[str, list[float]]:
    tensors: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def losses(folder: Path) -> list[tuple[str, str]]:
    with (folder / "per_step_metrics.csv").open(newline="") as file:
        return [(row["Step"], row["Step Loss"]) for row in csv.DictReader(file)]


def test_legs_of_any_length_are_one_run(settings: dict[str, str], tmp_path: Path) -> None:
    whole, legs = tmp_path / "whole", tmp_path / "legs"
    settings |= {"training.max_steps": "7", "checkpoint.save": "true"}
    assert run(settings, training__output_dir=str(whole)) == 0
    given = settings | {"training.output_dir": str(legs), "training.resume": "auto", "checkpoint.keep": "2"}
    for length, names in (("3", ["iter_3"]), ("1", ["iter_3", "iter_4"]), ("9", ["iter_4", "iter_7"])):
        assert run(given, checkpoint__num_steps=length) == 0
        assert saved(given) == names
    assert losses(legs) == losses(whole)
    assert weights(legs) == weights(whole)


@pytest.mark.parametrize(("steps", "names"), [("[2,3]", ["iter_2", "iter_3", "iter_4"]), ("3", ["iter_3", "iter_4"])])
def test_saved_are_the_steps_asked_for_and_the_last(settings: dict[str, str], steps: str, names: list[str]) -> None:
    assert run(settings, checkpoint__save="true", checkpoint__save_steps=steps) == 0
    assert saved(settings) == names


def test_nothing_is_saved_unasked(settings: dict[str, str]) -> None:
    assert run(settings) == 0
    assert saved(settings) == []


def test_a_run_killed_behind_its_last_checkpoint_still_gets_its_model_and_report(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(settings, checkpoint__save="true") == 0
    before = weights(output)
    for name in ("model.safetensors", "config.json", "report.html", "summary.txt"):
        (output / name).unlink()
    again = settings | {"training.resume": "auto"}
    assert run(again) == 0
    assert weights(output) == before
    assert (output / "report.html").exists()
    assert "Nothing is left to do" not in capsys.readouterr().out
    assert run(again) == 0
    assert "All 4 steps were taken" in capsys.readouterr().out
    assert weights(output) == before


def test_a_damaged_newest_checkpoint_costs_its_steps_only(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(settings, checkpoint__save="true", checkpoint__save_steps="2") == 0
    before = weights(tmp_path / "out")
    broken = tmp_path / "out" / "checkpoints" / "iter_4" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    assert run(settings, training__resume="auto", checkpoint__keep="1") == 0
    told = capsys.readouterr()
    assert told.err.startswith("warning: skipping checkpoint ")
    assert "model.safetensors has" in told.err
    assert "Going on after step 2" in told.out
    assert saved(settings) == ["iter_4"]
    assert weights(tmp_path / "out") == before


def test_another_runs_checkpoints_are_not_touched(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(settings, checkpoint__save="true") == 0
    other = settings | {"training.output_dir": str(tmp_path / "other"), "checkpoint.save": "true"}
    with pytest.raises(UserError, match=r"checkpoints holds iter_4, and this run starts anew"):
        run(other, checkpoint__save_path=str(tmp_path / "out" / "checkpoints"))
    assert saved(settings) == ["iter_4"]
    assert not (tmp_path / "other").exists()


def test_overwriting_a_run_takes_its_checkpoints_too(settings: dict[str, str], tmp_path: Path) -> None:
    assert run(settings, checkpoint__save="true", checkpoint__save_steps="1") == 0
    again = {"training.overwrite_output_dir": "true", "training.max_steps": "2"}
    assert run(settings | again, checkpoint__save="true") == 0
    assert saved(settings) == ["iter_2"]


def test_a_disk_without_room_for_one_checkpoint_is_refused_at_the_start(
    settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    needed = 34_720 * 12  # weights and two moments in float32
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real(place)._replace(free=needed - 1))
    with pytest.raises(UserError, match=r"The checkpoint takes about .* the disk of checkpoint\.save_path="):
        run(settings, checkpoint__save="true")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: real(place)._replace(free=needed))
    assert run(settings, checkpoint__save="true") == 0
