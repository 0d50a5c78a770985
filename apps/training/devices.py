"""Where a run computes: its device, threads, and peak."""

from __future__ import annotations

import torch

from apps.training.reporting.throughput import peak_flops


def open_device(kind: str, num_threads: int | None) -> torch.device:
    """The device of that kind ("cpu" or "cuda"); `num_threads` for what the CPU does, None: torch's choice."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")


def describe(device: torch.device) -> str:
    """`NVIDIA H200` or `CPU, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_of(device: torch.device, dtype: str) -> float | None:
    """The device's peak in FLOP/s where it is known; a CPU's is not."""
    return peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
