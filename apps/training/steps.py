"""How many optimizer steps a run takes, and where in its epochs each of them lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from apps.training.config_schema import TrainingConfig
from apps.training.token_budget import TokenBudget, count_tokens
from backends.errors import UserError


def accumulation_steps(settings: TrainingConfig, world_size: int, *, kept_from: Path | None = None) -> int:
    """Microbatches of each worker in a step: as many as make `global_batch_size` rows, or else as many as were asked.

    kept_from: the checkpoint that says the global batch, which nobody gave. UserError when the rows of one microbatch
    of all workers do not divide it.
    """
    rows, asked = settings.batch_size * world_size, settings.gradient_accumulation_steps
    if settings.global_batch_size is None:
        return asked
    given = f"training.global_batch_size={settings.global_batch_size}"
    other, drop = "Change one of them.", "Drop one of them."
    if kept_from is not None:
        given = f"A step of the run in {kept_from} has {settings.global_batch_size} rows, which"
        other = "Start another number of workers, or give other rows with checkpoint.overwrite_config=true."
        drop = "Leave it out, or give it with checkpoint.overwrite_config=true."
    if settings.global_batch_size % rows:
        workers = "1 worker takes" if world_size == 1 else f"{world_size} workers take"
        raise UserError(
            f"{given} is not a multiple of the {rows} rows that {workers} at a time "
            f"(training.batch_size={settings.batch_size} each). {other}"
        )
    needed = settings.global_batch_size // rows
    if asked not in (1, needed):
        raise UserError(
            f"{given} over {rows} rows at a time makes {needed} microbatch{'es' * (needed != 1)}, but "
            f"training.gradient_accumulation_steps={asked} was given too. {drop}"
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
    budget: TokenBudget | None = None  # what the total follows from, if it was given in tokens

    @property
    def num_epochs(self) -> int:
        return -(-self.total // self.steps_per_epoch)  # rounded up

    def position(self, step: int) -> Position:
        """Where update `step` (1 … total) lies."""
        before, inside = divmod(step - 1, self.steps_per_epoch)
        steps = min(self.steps_per_epoch, self.total - before * self.steps_per_epoch)
        return Position(before + 1, self.num_epochs, inside + 1, steps)


def count_steps(
    steps_per_epoch: int, settings: TrainingConfig, *, tokens_per_step: int, sizes: Mapping[str, int]
) -> StepCount:
    """`max_steps` steps, or those that `token_budget` takes, through as many epochs as needed; else `num_epochs`.

    tokens_per_step: positions in the rows of all microbatches of all workers. sizes: the model's number of parameters
    by the names a budget has for it. UserError when the budget comes to nothing for them.
    """
    if settings.token_budget is not None:
        tokens = count_tokens(settings.token_budget, sizes)
        budget = TokenBudget(settings.token_budget, tokens, tokens_per_step)
        return StepCount(steps_per_epoch, budget.steps, budget)
    steps = settings.max_steps
    return StepCount(steps_per_epoch, settings.num_epochs * steps_per_epoch if steps is None else steps)
