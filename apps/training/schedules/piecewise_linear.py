"""Piecewise linear: one rate until a given step, then a straight line to another at the end of the run."""

from __future__ import annotations

from dataclasses import dataclass

from apps.training.config_schema import setting
from apps.training.schedules._base import Schedule, peak_step, progress, warm_up


class PiecewiseLinear(Schedule):
    """lr until start_steps (after a warm-up if asked for), then a line that is at lr · final_ratio after the last step.

    The second rate is a share of the first, so that groups with a rate of their own keep their proportions.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `schedule=piecewise_linear`."""

        warmup_steps: int = setting(0, "steps until the first rate; the first one is above 0", at_least=0)
        start_steps: int = setting(0, "the last step at optimizer.lr; the line begins there", at_least=0)
        final_ratio: float = setting(0.1, "the second rate as a share of optimizer.lr; above 1 rises", at_least=0)

    @staticmethod
    def learning_rate(step: int, total_steps: int, lr: float, config: Config) -> float:
        """The rate of update `step` (1 … total_steps)."""
        x = progress(step, max(config.start_steps, peak_step(config.warmup_steps)), total_steps)
        return lr * warm_up(step, config.warmup_steps) * (1.0 + x * (config.final_ratio - 1.0))
