"""Cosine: a linear warm-up to the peak, then half a cosine down to the last step (arXiv 1608.03983, one cycle)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apps.training.config_schema import setting
from apps.training.schedules._base import Schedule, peak_step, progress, warm_up


class Cosine(Schedule):
    """lr · step/warmup up to the peak, then lr · ½(1 + cos πx), x from 0 there to 1 one step after the last."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `schedule=cosine`."""

        warmup_steps: int = setting(0, "steps until the peak; the first one is above 0", at_least=0)
        final_ratio: float = setting(0.0, "the curve ends at this share of the peak", at_least=0)

    @staticmethod
    def learning_rate(step: int, total_steps: int, lr: float, config: Config) -> float:
        """The rate of update `step` (1 … total_steps)."""
        x = progress(step, peak_step(config.warmup_steps), total_steps)
        height = 0.5 * (1.0 + math.cos(math.pi * x))
        return lr * warm_up(step, config.warmup_steps) * (config.final_ratio + (1.0 - config.final_ratio) * height)
