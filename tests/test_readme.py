"""Every command in the README runs, in the README's order, as a reader would type it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from apps.training.config import parse
from apps.training.data import corpus
from tests import warm_python

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


def tenth_of_the_corpus(folder: Path) -> Path:
    folder.mkdir()
    for number, path in enumerate(corpus.files()[::10]):
        shutil.copy(path, folder / f"{number}-{path.name}")
    return folder


def test_the_readme_opens_with_the_two_commands() -> None:
    assert BLOCKS[0] == ("bash", "make demo\nmake test\n")


def benchmarks() -> list[tuple[str, dict[str, str]]]:
    """Script and settings of each benchmark in the README."""
    blocks = [shlex.split(block.replace("\\\n", " ")) for language, block in BLOCKS if language == "text"]
    assert all(python == "python" for python, *_ in blocks)
    return [(script, dict(setting.split("=", 1) for setting in settings)) for _, script, *settings in blocks]


def test_the_benchmarks_of_the_readme_have_settings_that_exist() -> None:
    assert len(benchmarks()) >= 2
    for script, settings in benchmarks():
        own = import_module(f"benchmarks.{Path(script).stem}").OWN
        given = [f"{key}={value}" for key, value in settings.items() if key not in own]
        assert parse(["command=compile", *given]).command == "compile"


@pytest.mark.slow
def test_the_benchmarks_of_the_readme_run(tmp_path: Path) -> None:
    """On a model of one block: the README's sizes are for a GPU, or for an idle machine."""
    config = json.loads((ROOT / "benchmarks/cpu_model/config.json").read_text())
    small = {"hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config | small))
    dataset = f"input={ROOT}/README.md output_dir={tmp_path}/dataset max_seq_length=32 vocab_size=512"
    python("apps/prepare_data.py", *dataset.split())
    shape = {"checkpoint.config_name": str(tmp_path), "model.max_seq_length": "32"}
    for script, settings in benchmarks():
        own = import_module(f"benchmarks.{Path(script).stem}").OWN
        quick = {"peers": "none", "steps": "3", "rounds": "1", "batch_size": "1", "rows": "cpu"}
        given = settings | shape | {key: value for key, value in quick.items() if key in own}
        if "batch_size" in own:
            given["training.dataset"] = f"{tmp_path}/dataset"
        else:
            given |= {"training.batch_size": "1", "compile.arch": "cpu"}
            given |= {"compile.output_dir": f"{tmp_path}/artifacts"} if script.endswith("weak_scaling.py") else {}
        arguments = [f"{key}={value}" for key, value in given.items()]
        if script.endswith("weak_scaling.py"):  # takes the artifact that the sentence below it makes
            python("apps/train_llm.py", "command=compile", *(a for a in arguments if a.split("=")[0] not in own))
        assert re.search(r"tokens_per_s|two workers / one process", python(script, *arguments))


def python(script: str, *arguments: str) -> str:
    ended = subprocess.run(
        [warm_python.python(), ROOT / script, *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{script} {arguments}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    return ended.stdout


@pytest.mark.slow
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    (tmp_path / "reader").mkdir()
    folder = reader_folder(tmp_path / "reader")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "VENV": "",  # the packages are there: the demo need not install them again
        "DEMO_STEPS": "2",
        "DEMO_TEXT": str(tenth_of_the_corpus(tmp_path / "text")),  # what is held out of it is evaluated five times
    }
    for language, block in BLOCKS:
        if language == "text":  # a benchmark, see above
            continue
        if language == "python":  # a file, named by its first line
            (folder / block.splitlines()[0].removeprefix("# ")).write_text(block)
            continue
        commands = block.replace("make test", "make --dry-run test")  # this very run
        # The demo compiles and starts its programs as the reader's does, the rest as all tests do.
        warm = {"PATH": f"{Path(warm_python.python()).parent}:{environment['PATH']}", "PYTHON": warm_python.python()}
        as_readers = {"AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL": "O1"}
        own = as_readers if block.startswith("make demo\n") else warm
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env=environment | own,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, f"{commands}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
        assert "Traceback" not in ended.stderr, f"{commands}\n{ended.stderr[-2000:]}"
