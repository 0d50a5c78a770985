"""Every command in the README runs, in the README's order, as a reader would type it."""

import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from apps.training.config import parse

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def reader_folder(folder: Path) -> Path:
    """A checkout to work in, whose `outputs/` is its own: everything else is a link to this one."""
    for path in ROOT.iterdir():
        if path.name not in ("outputs", ".venv", ".git"):
            (folder / path.name).symlink_to(path)
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    return folder


def test_the_readme_opens_with_the_two_commands() -> None:
    assert BLOCKS[0] == ("bash", "make demo\nmake test\n")


def test_the_benchmarks_of_the_readme_have_settings_that_exist() -> None:
    """They are not run here: they need a GPU, or an idle machine."""
    benchmarks = [block for language, block in BLOCKS if language == "text"]
    assert len(benchmarks) >= 2
    for block in benchmarks:
        python, script, *given = shlex.split(block.replace("\\\n", " "))
        assert python == "python"
        assert (ROOT / script).is_file()
        own = import_module(f"benchmarks.{Path(script).stem}").OWN
        settings = [argument for argument in given if argument.split("=")[0] not in own]
        assert parse(["command=compile", *settings]).command == "compile"


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    folder = reader_folder(tmp_path)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "VENV": "",  # the packages are there: the demo need not install them again
        "DEMO_STEPS": "2",
    }
    for language, block in BLOCKS:
        if language == "text":  # a benchmark, for another machine or an idle one
            continue
        if language == "python":  # a file, named by its first line
            (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
            continue
        commands = block.replace("make test", "make --dry-run test")  # this very run
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{commands}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
        assert "Traceback" not in ended.stderr, f"{commands}\n{ended.stderr[-2000:]}"
