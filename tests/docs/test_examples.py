"""The examples run as they are, offline, and train: the loss falls and the layers' ranges follow the signals."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests import warm_python

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.py"))
OFFLINE = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def run(name: str, folder: Path, *arguments: str) -> str:
    """What the example prints, started from another folder, in which it leaves nothing."""
    command = [warm_python.python(), str(ROOT / "docs/examples" / name), *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | OFFLINE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(folder.iterdir())
    return done.stdout


def losses(printed: str) -> tuple[float, float]:
    before, after = re.findall(r"^Loss before: (\S+), after: (\S+)$", printed, re.MULTILINE)[0]
    return float(before), float(after)


def state(printed: str) -> dict[str, float]:
    """The buffers of the one layer that is shown."""
    return {name: float(value) for name, value in re.findall(r"^State (\w+): \[(\S+)\]$", printed, re.MULTILINE)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "routed"),
    [("finetune_roberta.py", 64, "12 of 14 layers"), ("trainer_zoo_llama.py", 64, "16 of 17 layers")],
)
def test_an_example_trains_with_optical_layers(name: str, steps: int, routed: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path)
    assert f"Routed to other backends than dense: {routed}." in printed
    before, after = losses(printed)
    assert after < 0.7 * before
    buffers = state(printed)
    assert buffers["step"] == steps
    for signal in ("x", "w", "out"):  # they start at inf and -inf: not seen yet
        assert -100 < buffers[f"{signal}_min"] < 0 < buffers[f"{signal}_max"] < 100


@pytest.mark.slow
def test_another_backend_is_an_argument(tmp_path: Path) -> None:
    printed = run("finetune_roberta.py", tmp_path, "dense")
    before, after = losses(printed)
    assert after < 0.7 * before
    assert not state(printed)


def test_an_example_is_short_and_says_how_it_is_run() -> None:
    assert len(EXAMPLES) == 2
    for file in EXAMPLES:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80
        assert f"    python docs/examples/{file.name}  " in text
