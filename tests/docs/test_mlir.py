"""docs/mlir.md, done as a reader would: the compiler's file, its artifact, a run with the eager twin's losses."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm_python

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/mlir.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)(?: file=(\S+))?\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def shell(commands: str, folder: Path) -> str:
    path = f"{Path(warm_python.python()).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["bash", "-euo", "pipefail", "-c", commands.replace("PYTHONPATH=.", "PYTHONPATH=.:$PYTHONPATH")]
    ended = subprocess.run(
        words, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def losses(run: Path) -> list[float]:
    with (run / "per_step_metrics.csv").open() as metrics:
        return [float(row["Step Loss"]) for row in csv.DictReader(metrics)]


def test_the_example_is_short() -> None:
    (code,) = [code for language, _, code in BLOCKS if language == "python"]
    assert len(code.splitlines()) <= 40


@pytest.mark.slow
def test_the_page_from_start_to_end(tmp_path: Path) -> None:
    pytest.importorskip("torch_mlir", reason="needs the extra [mlir]")
    pytest.importorskip("iree.compiler", reason="needs the extra [mlir]")
    (tmp_path / "apps").symlink_to(ROOT / "apps")
    for language, name, code in BLOCKS:
        if language == "python":
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text(code)
    (commands,) = [code for language, _, code in BLOCKS if language == "sh"]
    run = re.search(r"python \S+ command=run.*", commands, re.DOTALL)
    assert run is not None
    twin = run[0].strip().replace("target=mlir", "target=eager")
    again = {name: f"training.output_dir={tmp_path}/{name}" for name in ("own", "twin")}
    shell(f"{commands.strip()} {again['own']}\nexport PYTHONPATH=.\n{twin} {again['twin']}", tmp_path)
    assert len(losses(tmp_path / "own")) == 4
    assert losses(tmp_path / "own") == pytest.approx(losses(tmp_path / "twin"), rel=1e-5)
