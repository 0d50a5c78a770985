"""NAdam (Dozat, 2016) as optax has it: Adam a step further along the mean; the decay is part of the gradient."""

from __future__ import annotations

from dataclasses import dataclass

from apps.training.optimizers.adam import Adam


class NAdam(Adam):
    """As Adam, with m̂ = β1·m / (1−β1^(t+1)) + (1−β1)·g / (1−β1^t) after m has taken g in; g ← g + λ·p before."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Adam.Config):
        """Settings of `optimizer=nadam`: Adam's."""

    looks_ahead = True
