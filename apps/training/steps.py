"""How many optimizer steps a run takes, and where in its epochs each of them lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from apps.training.config_schema import TrainingConfig
from backends.errors import UserError


def accumulation_steps(settings: TrainingConfig, world_size: int) -> int:
    """Microbatches of each worker in a step: as many as make `global_batch_size` rows, or else as many as were asked.

    UserError when the rows of one microbatch of all workers do not divide the global batch.
    """
    rows, asked = settings.batch_size * world_size, settings.gradient_accumulation_steps
    if settings.global_batch_size is None:
        return asked
    if settings.global_batch_size % rows:
        raise UserError(
            f"training.global_batch_size={settings.global_batch_size} is not a multiple of the {rows} rows that "
            f"{world_size} workers take at a time (training.batch_size={settings.batch_size} each). Change one of them."
        )
    needed = settings.global_batch_size // rows
    if asked not in (1, needed):
        raise UserError(
            f"training.global_batch_size={settings.global_batch_size} over {rows} rows at a time makes {needed} "
            f"microbatches, but training.gradient_accumulation_steps={asked} was given too. Drop one of them."
        )
    return needed


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
