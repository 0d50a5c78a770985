"""docs/own-optimizer.md, done as a reader would: the file, its help, an artifact, two workers with ZeRO-1, a resume."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps.training import optimizers
from apps.training.config_help import help_text
from apps.training.config_schema import TrainConfig
from tests import warm_python
from tests.apps.training.optimizers.references import decoupled, optaxs

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/own-optimizer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def own_file(folder: Path) -> Path:
    (code,) = [block for language, block in BLOCKS if language == "python"]
    assert len(code.splitlines()) <= 30
    path = folder / code.splitlines()[0].removeprefix("# ")
    path.write_text(code)
    return path


@pytest.mark.slow
def test_the_page_from_start_to_end(tmp_path: Path) -> None:
    own_file(tmp_path)
    (tmp_path / "apps").symlink_to(ROOT / "apps")
    (commands,) = [block for language, block in BLOCKS if language == "bash"]
    path = f"{Path(warm_python.python()).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    assert "optimizer.beta: float = 0.9" in ended.stdout
    assert "Going on after step 2" in ended.stdout
    run = tmp_path / "outputs/runs/signum"
    with (run / "per_step_metrics.csv").open() as metrics:
        assert [row["Step"] for row in csv.DictReader(metrics)] == ["1", "2", "3", "4"]
    files = sorted((run / "checkpoints/iter_4").glob("optimizer-*.safetensors"))
    shares = [{key for key in load_file(file) if key.endswith(".mean")} for file in files]
    assert len(shares) == 2
    assert all(shares)
    assert not shares[0] & shares[1]
    manifest = json.loads((run / "checkpoints/iter_4/manifest.json").read_text())
    assert manifest["files"]


def test_the_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the others it has a name like theirs, and stands in the help."""
    own_file(tmp_path)
    others = optimizers.available()
    for name in others:
        optimizers.load(name)
        (tmp_path / f"{name}.py").touch()  # imported already: only the name counts
    monkeypatch.setattr(optimizers, "__path__", [str(tmp_path)])
    assert optimizers.available() == tuple(sorted([*others, "signum"]))
    try:
        assert optimizers.load("signum").state_names == ("mean",)
        assert "optimizer=signum\n" in help_text(TrainConfig, "train_llm.py")
    finally:
        sys.modules.pop("apps.training.optimizers.signum", None)


def test_it_is_the_formula(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lion with β1 = β2 is the sign of a momentum."""
    own_file(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    signum = optimizers.load("signum:Signum")
    rule, config = signum(), signum.Config()
    start = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = decoupled(optaxs("lion", b1=0.9, b2=0.9, weight_decay=0.0), 0.1)(start)
    value, state = start, {"mean": torch.zeros_like(start)}
    for step in range(1, 6):
        gradient = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        numbers = rule.hyperparameters(config, step, 1e-2, True)
        value, state = rule.update(
            value, gradient, state, {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}
        )
        assert (value - theirs(gradient, 1e-2)).abs().max() <= 1e-10
