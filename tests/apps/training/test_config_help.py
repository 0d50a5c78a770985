"""`--help` shows all there is to set, at once and without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import backends
from apps.training import optimizers, schedules
from apps.training.config import parse
from apps.training.config_keys import keys_of
from apps.training.config_schema import TrainConfig

ROOT = Path(__file__).resolve().parents[3]
KEYS = {
    key.path: key for plugin in optimizers.available() for key in keys_of(TrainConfig, {"optimizer": plugin}).values()
} | {key.path: key for plugin in schedules.available() for key in keys_of(TrainConfig, {"schedule": plugin}).values()}


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("path", KEYS)
def test_every_key_is_shown_with_type_default_and_help(shown: str, path: str) -> None:
    key = KEYS[path]
    assert key.help, f"{path} has no line of help"
    assert f"  {path}: {key.type_name} " in shown
    assert key.help in shown


def test_defaults_are_spelled_as_one_types_them(shown: str) -> None:
    assert "training.batch_size: int = 8 " in shown
    assert "training.evaluate: bool = true " in shown
    assert "training.dataset: str = null " in shown
    assert "optimizer.lr: float = 0.001 " in shown
    assert "command: compile|run (required)" in shown


def test_every_plugin_and_backend_is_listed(shown: str) -> None:
    for name in optimizers.available():
        assert f"\noptimizer={name}\n" in shown
    for name in schedules.available():
        assert f"\nschedule={name}\n" in shown
    assert f"\nbackends: {', '.join(backends.available())}\n" in shown


def test_it_fits_a_wide_terminal(shown: str) -> None:
    assert max(map(len, shown.splitlines())) <= 120


def test_help_wins_over_everything_else_given(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["command=nonsense", "-h"], ["foo", "--help"]):
        with pytest.raises(SystemExit):
            parse(arguments)
        assert capsys.readouterr().out.startswith("usage: train_llm.py command=compile|run [key=value ...]")


@pytest.mark.parametrize("arguments", [["--help"], ["command=compil"], ["command=run"]])
def test_parsing_needs_no_torch_and_half_a_second_of_cpu(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom apps.training.config import parse\n"
        "try:\n    parse(sys.argv[1:])\nexcept (SystemExit, ValueError):\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    before = os.times()
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5
