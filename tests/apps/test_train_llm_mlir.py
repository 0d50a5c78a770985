"""`compile.target=mlir` from the command line: an artifact, through IREE, against the eager twin; workers; a resume."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import warm_python
from tests.apps.test_train_llm import SCRIPT, arguments, losses
from tests.apps.training.workers.launchers import command

STEPS = "20"
Train = Callable[..., list[float]]


def train_llm(settings: dict[str, str], launch: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a process of its own: one that has made IREE's runtime must not fork, as pytest's may."""
    words = [*(launch or [warm_python.python()]), str(SCRIPT), *arguments(settings)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ)


@pytest.fixture
def train(settings: dict[str, str], artifacts: Path, tmp_path: Path) -> Train:
    """Twenty steps of eight rows into tmp_path/NAME; the losses."""

    def run(name: str, *, workers: int = 1, **changes: str) -> list[float]:
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        given = settings | {
            "compile.target": "mlir",
            "compile.output_dir": str(artifacts),
            "training.max_steps": STEPS,
            "training.global_batch_size": "8",
            "training.evaluate": "false",
            "training.output_dir": str(tmp_path / name),
        }
        ended = train_llm(given | changed, command("mpich", workers, warm_python.python()) if workers > 1 else None)
        assert (ended.returncode, ended.stderr.count("error")) == (0, 0), ended.stderr
        return losses(tmp_path / name)

    return run


@pytest.fixture(scope="module")
def artifacts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artifact of the step, made by `command=compile`."""
    pytest.importorskip("torch_mlir", reason="needs the extra [mlir]")
    pytest.importorskip("iree.compiler", reason="needs the extra [mlir]")
    folder = tmp_path_factory.mktemp("mlir-artifacts")
    ended = train_llm(
        {
            "command": "compile",
            "compile.target": "mlir",
            "compile.output_dir": str(folder),
            "checkpoint.config_name": str(tiny_model),
            "model.max_seq_length": "32",
            "training.batch_size": "4",
        }
    )
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.mark.slow
def test_twenty_steps_equal_the_eager_twin(train: Train) -> None:
    found, expected = train("mlir"), train("eager", compile__target="eager")
    assert len(found) == int(STEPS)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_workers_and_a_resumed_run_give_the_same(train: Train, tmp_path: Path) -> None:
    alone = train("alone")
    two = train("two", workers=2)
    assert two == pytest.approx(alone, rel=1e-5)
    saving = {"checkpoint__save": "true", "checkpoint__num_steps": "7"}
    assert len(train("parts", **saving)) == 7
    assert train("parts", training__resume="auto", **saving | {"checkpoint__num_steps": "100"}) == alone
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("alone", "parts")]
    assert weights[0] == weights[1]
