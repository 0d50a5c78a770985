"""Many workers from the command line: the numbers of one process, whatever launches them, however many they are."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from apps.training.reporting.output_folder import METRICS
from tests import warm_python
from tests.apps.test_train_llm import SCRIPT, arguments, losses, metrics, run
from tests.apps.training.workers.launchers import command

STEP = {"training.gradient_accumulation_steps": "1", "training.batch_size": "2", "training.max_steps": "5"}


def job(launcher: str, workers: int, settings: dict[str, str], **changes: str) -> subprocess.CompletedProcess[str]:
    changed = {key.replace("__", "."): value for key, value in changes.items()}
    words = [*command(launcher, workers, warm_python.python()), str(SCRIPT), *arguments(settings | changed)]
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(words, env=os.environ | allowed, capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture
def one_process(settings: dict[str, str], tmp_path: Path) -> Path:
    """Five steps of eight rows, by one process, with an evaluation after the second and the last."""
    out = tmp_path / "one"
    changes = {"training__output_dir": str(out), "training__eval_steps": "2", "training__global_batch_size": "8"}
    assert run(settings | STEP, **changes) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpich", "torchrun", "openmpi"])
def test_two_workers_give_the_numbers_of_one_process(
    launcher: str, settings: dict[str, str], one_process: Path, tmp_path: Path
) -> None:
    done = job(launcher, 2, settings | STEP, training__eval_steps="2", training__global_batch_size="8")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(one_process), rel=1e-6)
    for column in ("Tokens in Step", "Counted Tokens", "Learning Rate", "Step", "Epoch"):
        assert [row[column] for row in metrics(tmp_path / "out")] == [row[column] for row in metrics(one_process)]
    lines = done.stdout.splitlines()
    assert lines.count("Number of DP workers: 2") == 1
    assert len([line for line in lines if line.startswith("DP: 2-way, Epoch [")]) == 5  # worker 0's alone
    found = [float(line.split()[2].rstrip(",")) for line in lines if line.startswith("Evaluation loss")]
    expected = [line for line in (one_process / "summary.txt").read_text().splitlines() if "valuation" in line]
    assert len(found) == 3
    assert any(f"{found[-1]:.4f}" in line for line in expected)


@pytest.mark.slow
def test_a_run_saved_by_two_workers_goes_on_with_one_and_with_four(
    settings: dict[str, str], one_process: Path, tmp_path: Path
) -> None:
    given = settings | STEP | {"training.eval_steps": "2", "training.global_batch_size": "8", "checkpoint.save": "true"}
    first = job("mpich", 2, given, checkpoint__num_steps="2")
    assert first.returncode == 0, first.stderr
    assert len(losses(tmp_path / "out")) == 2
    again = {"checkpoint.load": "true", "checkpoint.load_path": str(tmp_path / "out" / "checkpoints")}
    elsewhere = {"training__output_dir": str(tmp_path / "four"), "checkpoint__save_path": str(tmp_path / "four" / "c")}
    four = job("mpich", 4, given | again, **elsewhere)
    assert four.returncode == 0, four.stderr
    assert run(given, training__resume="auto") == 0
    for out in (tmp_path / "out", tmp_path / "four"):
        assert losses(out) == pytest.approx(losses(one_process), rel=1e-6)
        assert [row["Step"] for row in metrics(out)] == ["1", "2", "3", "4", "5"]


@pytest.mark.slow
def test_a_mistake_is_said_once(settings: dict[str, str], tmp_path: Path) -> None:
    for change in ({"training__global_batch_size": "9"}, {"training__datset": "x"}, {"training__batch_size": "5000"}):
        done = job("mpich", 2, settings | STEP, **change)
        assert done.returncode == 2
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1, done.stderr
        assert not (tmp_path / "out" / METRICS).exists()


def test_a_checkpoint_of_another_run_is_a_table(
    settings: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings | STEP | {"checkpoint.save": "true", "checkpoint.num_steps": "1"}
    assert run(given) == 0
    again = given | {"checkpoint.load": "true", "checkpoint.load_path": str(tmp_path / "out" / "checkpoints")}
    before = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    capsys.readouterr()
    assert run(again, training__seed="7", training__output_dir=str(tmp_path / "new")) == 2
    error = capsys.readouterr().err
    assert "training.seed" in error
    assert "checkpoint.overwrite_config=true" in error
    assert run(again, optimizer__lr="1e-5", training__output_dir=str(tmp_path / "new")) == 2
    assert "optimizer.lr" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert sorted(path.name for path in (tmp_path / "out").rglob("*")) == before
    wider = json.loads((Path(given["checkpoint.config_name"]) / "config.json").read_text()) | {"intermediate_size": 64}
    (tmp_path / "wider").mkdir()
    (tmp_path / "wider" / "config.json").write_text(json.dumps(wider))
    other = {"checkpoint__config_name": str(tmp_path / "wider"), "checkpoint__overwrite_config": "true"}
    assert run(again, **other, training__output_dir=str(tmp_path / "new")) == 2
    assert "intermediate_size" in capsys.readouterr().err
