"""Trapezoid: a linear warm-up to the peak, flat, and a straight line down over the last steps."""

from __future__ import annotations

from dataclasses import dataclass

from apps.training.config_schema import setting
from apps.training.schedules._base import Schedule, peak_step, progress, warm_up


class Trapezoid(Schedule):
    """lr · step/warmup up to the peak, flat, then over decay_steps down to lr · final_ratio one step after the last."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `schedule=trapezoid`."""

        warmup_steps: int = setting(0, "steps until the peak; the first one is above 0", at_least=0)
        decay_steps: int | None = setting(None, "last steps, which fall; null: a fifth of the run", at_least=0)
        final_ratio: float = setting(0.0, "the line ends at this share of the peak", at_least=0)

    @staticmethod
    def learning_rate(step: int, total_steps: int, lr: float, config: Config) -> float:
        """The rate of update `step` (1 … total_steps). A decay longer than what the warm-up leaves is cut to that."""
        falling = total_steps // 5 if config.decay_steps is None else config.decay_steps
        start = max(total_steps - falling, peak_step(config.warmup_steps))
        fallen = progress(step, start, total_steps) * (1.0 - config.final_ratio)
        return lr * warm_up(step, config.warmup_steps) * (1.0 - fallen)
