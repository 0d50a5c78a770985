"""Constant: the peak in every step, after a linear warm-up if asked for."""

from __future__ import annotations

from dataclasses import dataclass

from apps.training.config_schema import setting
from apps.training.schedules._base import Schedule, warm_up


class Constant(Schedule):
    """lr · step/warmup up to the peak, then lr."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `schedule=constant`."""

        warmup_steps: int = setting(0, "steps until the peak; the first one is above 0", at_least=0)

    @staticmethod
    def learning_rate(step: int, total_steps: int, lr: float, config: Config) -> float:
        """The rate of update `step` (1 … total_steps)."""
        return lr * warm_up(step, config.warmup_steps)
