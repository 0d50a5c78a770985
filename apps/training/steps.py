"""How many optimizer steps a run takes, and where in its epochs each of them lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Position(NamedTuple):
    """What `Epoch [epoch/epochs], Step [step/steps]` shows; all count from 1."""

    epoch: int
    epochs: int
    step: int
    steps: int


@dataclass(frozen=True)
class StepCount:
    """`total` optimizer steps, `steps_per_epoch` of them in an epoch (the last epoch may be cut short)."""

    steps_per_epoch: int
    total: int

    @property
    def num_epochs(self) -> int:
        return -(-self.total // self.steps_per_epoch)  # rounded up

    def position(self, step: int) -> Position:
        """Where update `step` (1 … total) lies."""
        before, inside = divmod(step - 1, self.steps_per_epoch)
        steps = min(self.steps_per_epoch, self.total - before * self.steps_per_epoch)
        return Position(before + 1, self.num_epochs, inside + 1, steps)


def count_steps(steps_per_epoch: int, *, num_epochs: int, max_steps: int | None) -> StepCount:
    """`max_steps` steps, through as many epochs as they take, or else `num_epochs` whole epochs."""
    return StepCount(steps_per_epoch, num_epochs * steps_per_epoch if max_steps is None else max_steps)
