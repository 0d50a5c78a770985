"""How long a forward and a forward with backward take, and what memory they need on top of the weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from apps.parity.forward import logits_of, loss_of
from backends.state import collect_state


@dataclass(frozen=True)
class Timing:
    """Medians over rounds, in seconds for a batch; `memory` in bytes, None where nothing measures it (on a CPU).

    `forward` is in evaluation mode without gradients. `step` is forward and backward in training mode, statistics
    included, with the gradient of every trained weight; without an update. `memory` is the peak of `step` above what
    was there before it: activations, gradients, buffers of the backend. `ratio` is the median of step time over the
    reference's in the same round.
    """

    forward: float
    step: float
    memory: int | None
    ratio: float


def time_in_turns(
    models: Sequence[Any], batch: Mapping[str, Tensor], *, rounds: int, on_round: Callable[[], object]
) -> list[Timing]:
    """Time `models`, the reference first, one after the other in each round, so that a busy machine is busy for all.

    A first round is not counted. No state of a backend changes.
    """
    device = batch["input_ids"].device
    forwards: list[list[float]] = [[] for _ in models]
    steps: list[list[float]] = [[] for _ in models]
    memory: list[int | None] = [None for _ in models]
    for number in range(rounds + 1):
        for index, model in enumerate(models):
            forward = _seconds(lambda: _forward(model, batch), device)  # noqa: B023 (called at once)
            before = _start_of_peak(device)
            step = _seconds(lambda: _step(model, batch), device)  # noqa: B023
            if number > 0:
                forwards[index].append(forward)
                steps[index].append(step)
                memory[index] = None if before is None else torch.cuda.max_memory_allocated(device) - before
        on_round()
    return [
        Timing(
            forward=median(forwards[index]),
            step=median(steps[index]),
            memory=memory[index],
            ratio=median(own / first for own, first in zip(steps[index], steps[0], strict=True)),
        )
        for index in range(len(models))
    ]


def _forward(model: Any, batch: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        logits_of(model, batch)


def _step(model: Any, batch: Mapping[str, Tensor]) -> None:
    model.train()
    try:
        with collect_state():  # new statistics are computed, as in a train step, and dropped
            loss = loss_of(logits_of(model, batch), batch)
            torch.autograd.grad(loss, [weight for weight in model.parameters() if weight.requires_grad])
    finally:
        model.eval()


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_of_peak(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
