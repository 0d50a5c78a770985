"""The compiler's processes, and the kind of device they compile for. Light to import: they are started first of all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from apps.training.config_schema import CompileConfig
from backends.errors import UserError
from compiled.spawned import MOST, SpawnedWorkers, compile_threads


def compilers_of(settings: CompileConfig) -> AbstractContextManager[SpawnedWorkers | None]:
    """Processes for the compiler of a GPU, which start while the caller goes on; None where no GPU is compiled for.

    UserError for a GPU on a machine without.
    """
    count = min(settings.workers or compile_threads(), MOST)
    if count == 1 or settings.target == "mlir" or device_kind(settings.arch) == "cpu":
        return nullcontext()
    return SpawnedWorkers(count, "cuda")


def device_kind(arch: str) -> str:
    """ "cpu" or "cuda"; auto takes a GPU where there is one. UserError for cuda on a machine without."""
    if arch == "cpu":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if arch == "cuda":
        raise UserError(
            "compile.arch=cuda needs a CUDA device, and this machine has none. Use compile.arch=cpu or auto."
        )
    return "cpu"
