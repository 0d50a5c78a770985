"""Without the extra [mlir]: one line that says what to install, before any work."""

import builtins
import importlib.util
from pathlib import Path

import pytest

from apps import train_llm
from apps.training.cli import run_main
from compiled.mlir.extra import require_extra


def test_compile_says_which_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find, load = importlib.util.find_spec, builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> object:
        assert not name.startswith(("torch_mlir", "iree")), "imported before it was asked for"
        return load(name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name.split(".")[0] in ("torch_mlir", "iree") else find(name, *rest),
    )
    settings = ["compile.target=mlir", f"compile.output_dir={tmp_path / 'artifacts'}", "compile.arch=cpu"]
    assert run_main(train_llm.program, ["command=compile", *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "pip install 'substrate[mlir]'" in line
    assert not list(tmp_path.rglob("*.substrate"))


def test_what_is_there_is_not_complained_about() -> None:
    require_extra("torch", "json")
