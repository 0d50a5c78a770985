"""How a run updates weights: which rule with which rate for which parameters, and clipping."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apps.training.config_schema import TrainConfig
from apps.training.parameter_groups import ParameterGroup
from apps.training.schedules import load as load_schedule


@dataclass(frozen=True)
class Recipe:
    """Rules and settings by group, the rate of a step for a group's peak, and clipping.

    `peak` is the one whose rates are recorded.
    """

    groups: Sequence[ParameterGroup]
    rate: Callable[[int, float], float]  # (step, peak) → rate
    peak: float
    max_grad_norm: float | None
    max_grad_value: float | None = None
    max_nonfinite_steps: int = 0  # in a row, then the run ends; 0: no update can be skipped
    rounding_seed: int | None = None  # of stochastic rounding, where there is any


def make_recipe(config: TrainConfig, groups: Sequence[ParameterGroup], total_steps: int) -> Recipe:
    """The recipe that the settings name. The schedule's peak is each group's `lr`."""
    schedule = config.schedule
    learning_rate = load_schedule(schedule.name).learning_rate
    return Recipe(
        groups=groups,
        rate=lambda step, peak: learning_rate(step, total_steps, peak, schedule.settings),
        peak=config.optimizer.settings.lr,
        max_grad_norm=config.training.max_grad_norm,
        rounding_seed=config.training.seed if config.precision.rounding == "stochastic" else None,
        max_grad_value=config.training.max_grad_value,
        max_nonfinite_steps=config.training.max_nonfinite_steps,
    )
