"""docs/own-backend.md is true: its files run, its commands are accepted, its backend passes the contract."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apps.training.config import parse
from backends import route
from modelzoo import build_model, load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/own-backend.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```python file=(\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """A folder with the page's files, importable here and in child processes."""
    for name, source in BLOCKS.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def run(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_backend_is_short():
    assert len(BLOCKS["mylab/crossbar.py"].splitlines()) <= 40


def test_the_python_example_runs_as_it_stands(lab):
    printed = run([sys.executable, str(lab / "try_it.py")], cwd=lab)
    assert "mylab.crossbar:Crossbar(levels=32)  " in printed
    assert float(re.search(r"input range seen: (\S+)", printed)[1]) > 1


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train_llm.py" in command])
def test_the_commands_route_the_demo_model_which_then_trains(lab, command):
    interpreter, script, *arguments = shlex.split(command)
    assert (interpreter, script) == ("python", "apps/train_llm.py")
    config = parse(arguments)
    model = build_model(load_config(config_name=config.checkpoint.config_name or "demo"))
    planned = route(model, config.backend.rules, config.backend.default)
    assert planned.routes[0].backend.name == "mylab.crossbar:Crossbar"
    assert {name.split(".")[-2] for name in planned.routes[0].layers} == {"mlp"}
    model.train()
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.get_submodule(planned.routes[0].layers[0])
    assert layer.input_range > 0
    assert layer.weight.grad.abs().sum() > 0


def test_the_backend_passes_the_contract_by_the_command_on_the_page(lab, monkeypatch):
    (command,) = [command for command in COMMANDS if "pytest" in command]
    setting, interpreter, *arguments = shlex.split(command)
    assert interpreter == "python"
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)
    printed = run([sys.executable, *arguments, "-p", "no:cacheprovider"], cwd=ROOT)
    assert re.search(r"\d\d passed", printed)


def test_the_readmes_backend_passes_it_too(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(# rounded\.py\n.*?)```", readme, re.DOTALL)
    (tmp_path / "rounded.py").write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("SUBSTRATE_BACKENDS", "rounded:Rounded")
    tests = [f"tests/backends/test_contract{part}.py" for part in ("", "_capture")]
    printed = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], cwd=ROOT)
    assert re.search(r"\d\d passed", printed)
