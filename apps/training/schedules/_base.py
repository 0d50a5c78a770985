"""What a schedule is: typed defaults and the learning rate of each step, in closed form."""

from __future__ import annotations

from typing import Any, ClassVar


class Schedule:
    """A learning rate for every step, without memory, so that a resumed run continues it exactly.

    A file in this folder holds one subclass; its `Config` gives the settings and their defaults.
    """

    Config: ClassVar[type]

    @staticmethod
    def learning_rate(step: int, total_steps: int, lr: float, config: Any) -> float:
        """The rate of update `step` (1 … total_steps) when the peak is `lr`; above 0 in the first warm-up step."""
        raise NotImplementedError


def warm_up(step: int, warmup_steps: int) -> float:
    """The share of the peak, a line that reaches 1 at step `warmup_steps`; 1 for every step without warm-up."""
    return min(step / warmup_steps, 1.0) if warmup_steps else 1.0


def progress(step: int, start: int, total_steps: int) -> float:
    """How far a decay has come at `step`: 0 up to step `start`, 1 one step after the last.

    Reaching 1 at the last step itself would make the last step of a decay to 0 do nothing.
    """
    if step <= start:
        return 0.0
    return min((step - start) / (total_steps + 1 - start), 1.0)


def peak_step(warmup_steps: int) -> int:
    """The first step at the peak: the last of the warm-up; without warm-up the first of all."""
    return max(warmup_steps, 1)
