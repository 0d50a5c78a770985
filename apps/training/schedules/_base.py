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
