"""Where a run computes: its device, threads, and peak."""

from __future__ import annotations

import ctypes

import torch

from apps.training.reporting.throughput import peak_flops


def open_device(kind: str, num_threads: int | None) -> torch.device:
    """The device of that kind ("cpu" or "cuda"); `num_threads` for what the CPU does, None: torch's choice."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if kind == "cpu":
        _keep_memory()
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def _keep_memory() -> None:
    """Let glibc keep what is freed; a step's buffers would else come from the system page by page (3 % of a step)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_trim_threshold, -1)  # never give the top of the heap back
        mallopt(m_mmap_max, 0)  # large blocks come from the heap too


def describe(device: torch.device) -> str:
    """`NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_of(device: torch.device, dtype: str) -> float | None:
    """The device's peak in FLOP/s where it is known; a CPU's is not."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
