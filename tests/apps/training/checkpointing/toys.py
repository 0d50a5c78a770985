"""A model and a program of a few numbers each, and steps to record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apps.training.checkpointing.writer import CheckpointWriter
from apps.training.reporting.records import Evaluation, StepRecord


class ToyModel(nn.Module):
    """Two weights of different dtypes, a bias, and the state of a backend, from one seed."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        values = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(6, 5, generator=values))
        self.second = nn.Parameter(torch.randn(4, 5, generator=values).bfloat16())
        self.bias = nn.Parameter(torch.randn(5, generator=values))
        self.register_buffer("seen", torch.randint(0, 99, (3,), generator=values), persistent=False)


class ToyProgram:
    """Two states of each parameter; with `owned`, only those of the named parameters, as under ZeRO-1."""

    def __init__(self, model: nn.Module, seed: int = 0, owned: set[str] | None = None) -> None:
        values = torch.Generator().manual_seed(seed + 1000)
        self.state = {
            f"{name}.{state}": torch.randn(parameter.shape, generator=values)
            for name, parameter in model.named_parameters()
            for state in ("exp_avg", "exp_avg_sq")
        }
        if owned is not None:
            self.state = {key: value for key, value in self.state.items() if key.rpartition(".")[0] in owned}

    def optimizer_state(self) -> dict[str, Tensor]:
        return self.state

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        for key, value in self.state.items():
            value.copy_(tensors[key])


def records(count: int) -> list[StepRecord]:
    return [
        StepRecord(
            step=step, epoch=1, loss=1 / step, lr=0.1 / step, num_tokens=10, num_counted=9, seconds=0.1, grad_norm=None
        )
        for step in range(1, count + 1)
    ]


def save(folder: Path, *steps: int, world_size: int = 1, keep: int | None = None, state: Any = None) -> None:
    """Complete checkpoints of `steps`, each with the numbers of its own seed, by `world_size` workers."""
    writers = [CheckpointWriter(folder, rank=rank, world_size=world_size, keep=keep) for rank in range(world_size)]
    for step in steps:
        for writer in reversed(writers):
            model = ToyModel(seed=step)
            torch.manual_seed(100 * step + writer.rank)
            model.seen += writer.rank
            writer.snapshot(step, model, ToyProgram(model, seed=step))
            writer.write(state or {}, records(step), [Evaluation(step=step, loss=0.5, num_counted=7)])
        for writer in writers:
            writer.wait()


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )
