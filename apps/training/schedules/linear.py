"""Linear: a linear warm-up to the peak, flat if asked for, then a straight line down to the last step."""

from __future__ import annotations

from dataclasses import dataclass

from apps.training.config_schema import setting
from apps.training.schedules._base import Schedule, peak_step, progress, warm_up


class Linear(Schedule):
    """lr · step/warmup up to the peak, flat, then down to lr · final_ratio one step after the last."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `schedule=linear`."""

        warmup_steps: int = setting(0, "steps until the peak; the first one is above 0", at_least=0)
        flat_steps: int = setting(0, "steps that stay at the peak", at_least=0)
        final_ratio: float = setting(0.0, "the line ends at this share of the peak", at_least=0)

    @staticmethod
    def learning_rate(step: int, total_steps: int, lr: float, config: Config) -> float:
        """The rate of update `step` (1 … total_steps)."""
        start = peak_step(config.warmup_steps) + config.flat_steps
        fallen = progress(step, start, total_steps) * (1.0 - config.final_ratio)
        return lr * warm_up(step, config.warmup_steps) * (1.0 - fallen)
