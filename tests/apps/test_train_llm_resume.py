"""Whose folder a resumed run writes to."""

from pathlib import Path
from typing import Any

import pytest
import torch

from apps.training.eager_program import EagerProgram
from tests.apps.test_train_llm import run


def test_another_runs_folder_is_not_the_one_to_go_on_in(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run whose checkpoints lie elsewhere, resumed into a folder that holds another finished run."""
    settings |= {"training.max_steps": "1", "training.evaluate": "false"}
    other = tmp_path / "other"
    assert run(settings, training__output_dir=str(other)) == 0
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    settings |= {"checkpoint.save": "true", "checkpoint.save_path": str(tmp_path / "saved"), "training.resume": "auto"}
    assert run(settings) == 0
    capsys.readouterr()
    assert run(settings, training__output_dir=str(other)) == 2
    assert "holds another run" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before
    assert run(settings) == 0
    assert "Nothing is left to do" in capsys.readouterr().out
    assert run(settings, training__output_dir=str(other), training__overwrite_output_dir="true") == 0
    assert "Nothing is left to do" not in capsys.readouterr().out


def test_a_place_to_load_from_that_is_not_loaded_from_is_told(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"training.max_steps": "1", "training.evaluate": "false", "lora.alpha": "16"}
    assert run(settings, checkpoint__load_path=str(tmp_path / "there")) == 0
    place, alpha = capsys.readouterr().err.splitlines()
    assert place.startswith(f"warning: checkpoint.load_path={tmp_path / 'there'} is not read")
    assert alpha.startswith("warning: lora.alpha=16 is not read")


@pytest.mark.parametrize("spoilt", [torch.nan, -torch.inf])
@pytest.mark.parametrize("ends_there", [False, True])
def test_weights_that_are_no_numbers_take_no_checkpoints_place(
    settings: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    spoilt: float,
    ends_there: bool,
) -> None:
    """A gradient that is not finite behind a loss that is, as of a backend's own backward: nobody looks at its norm."""
    steps = []

    def step_of(self: EagerProgram, *arguments: Any) -> Any:
        result = train_step(self, *arguments)
        steps.append(result)
        if len(steps) == 2:
            with torch.no_grad():
                self.model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] = spoilt
        return result

    train_step = EagerProgram.train_step
    monkeypatch.setattr(EagerProgram, "train_step", step_of)
    saving = {"checkpoint.save": "true", "checkpoint.save_steps": "1", "checkpoint.keep": "1"}
    settings |= saving | {"training.max_grad_norm": "null", "training.evaluate": "false"}
    settings |= {"training.max_steps": "2"} if ends_there else {}
    assert run(settings) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: The weights behind step 2 hold NaN or infinity, though its loss was finite")
    assert len(steps) == 2
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir() if path.is_dir()] == ["iter_1"]
    assert not (tmp_path / "out" / "model.safetensors").exists()
