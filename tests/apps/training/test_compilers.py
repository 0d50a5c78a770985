"""The compiler's processes: where they are started, how many, and that nothing heavy is imported before."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from apps.training import compilers
from apps.training.compilers import compilers_of, device_kind
from apps.training.config_schema import CompileConfig
from backends.errors import UserError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A machine with a GPU and 16 cores; what is started on it."""
    calls: list[tuple[Any, ...]] = []

    class Processes:
        def __init__(self, *given: Any) -> None:
            calls.append(given)

        def __enter__(self) -> "Processes":
            return self

        def __exit__(self, *error: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compilers, "compile_threads", lambda: 16)
    monkeypatch.setattr(compilers, "SpawnedWorkers", Processes)
    return calls


@pytest.mark.parametrize(("workers", "count"), [(None, 8), (3, 3), (32, 8)])
def test_a_gpu_has_compilers(started: list[tuple[Any, ...]], workers: int | None, count: int) -> None:
    with compilers_of(CompileConfig(workers=workers)) as found:
        assert found is not None
    assert started == [(count, "cuda")]


@pytest.mark.parametrize("settings", [{"target": "mlir"}, {"arch": "cpu"}, {"workers": 1}])
def test_elsewhere_there_are_none(started: list[tuple[Any, ...]], settings: dict[str, Any]) -> None:
    with compilers_of(CompileConfig(**settings)) as found:
        assert found is None
    assert started == []


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_kind("auto") == "cpu"
    with pytest.raises(UserError, match="this machine has none. Use compile.arch=cpu or auto"):
        compilers_of(CompileConfig(arch="cuda", workers=2))


def test_they_start_before_the_heavy_imports() -> None:
    heavy = ("transformers", "torch._inductor.compile_fx")
    code = f"import sys, apps.training.compilers; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
