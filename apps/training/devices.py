"""Where a run computes: its device, threads, and peak."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apps.training.config_schema import TrainConfig
from apps.training.reporting.throughput import peak_flops
from apps.training.workers.group import Workers
from backends.errors import UserError


def open_device(kind: str, config: TrainConfig, workers: Workers) -> torch.device:
    """The device of that kind ("cpu" or "cuda", see `own_gpu`); sets threads and determinism.

    CPU threads: run.num_threads, or what OMP_NUM_THREADS says, or for several workers an equal share of the cores.
    """
    num_threads = config.run.num_threads
    if num_threads is None and workers.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        num_threads = max(1, len(os.sched_getaffinity(0)) // workers.local_world_size)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if kind == "cpu":
        _keep_memory()
        _order_scattered_sums()
        return torch.device("cpu")
    if config.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS refuses
        torch.use_deterministic_algorithms(True)
    if not torch.cuda.is_available():
        raise UserError("compile.arch=cuda needs a CUDA device, and this worker has none. Use compile.arch=cpu.")
    return torch.device("cuda", 0)


@contextmanager
def memory_errors_told() -> Iterator[None]:
    """A device that runs out of memory in the block is the user's to mend: UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "Lower training.batch_size or model.max_seq_length."
        raise UserError(f"{str(error).splitlines()[0]} {fix}") from error


def choose_device(name: str) -> str:
    """The torch device for a `device` setting. Raises UserError when there is no GPU but one was asked for."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda was given, but torch finds no GPU here. Use device=cpu.")
    return "cuda" if available and name != "cpu" else "cpu"


def _keep_memory() -> None:
    """Let glibc keep what is freed; a step's buffers would else come from the system page by page (3 % of a step)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never give the top of the heap back
        mallopt(m_mmap_max, 0)  # large blocks come from the heap too


def _order_scattered_sums() -> None:
    """Let the embedding's gradient be summed in one order: with two threads its atomics gave other bits in each run.

    The compiled region calls PyTorch's operator, which looks at this switch when it runs. Memory that is not written
    yet need not be filled for it: nothing reads that.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property of the module


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> str:
    """`NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_of(device: torch.device, dtype: str) -> float | None:
    """The device's peak in FLOP/s where it is known; a CPU's is not."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
