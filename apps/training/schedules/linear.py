"""Linear: a linear warm-up to the peak, then a straight line down to the last step."""

from __future__ import annotations

from dataclasses import dataclass

from apps.training.config_schema import setting
from apps.training.schedules._base import Schedule


class Linear(Schedule):
    """lr · step/warmup up to the peak, then down to lr · final_ratio one step after the last."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `schedule=linear`."""

        warmup_steps: int = setting(0, "steps until the peak; the first one is above 0", at_least=0)
        final_ratio: float = setting(0.0, "the line ends at this share of the peak", at_least=0)

    @staticmethod
    def learning_rate(step: int, total_steps: int, lr: float, config: Config) -> float:
        """The rate of update `step` (1 … total_steps). The line meets final_ratio at step total_steps + 1.

        Meeting it at total_steps itself would make the last step of a decay to 0 do nothing.
        """
        if step <= config.warmup_steps:
            return lr * step / config.warmup_steps
        start = max(config.warmup_steps, 1)  # without warm-up the first step is already at the peak
        progress = min((step - start) / (total_steps + 1 - start), 1.0)
        return lr * (1.0 - progress * (1.0 - config.final_ratio))
