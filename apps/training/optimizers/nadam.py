"""NAdam (Dozat, 2016) as optax has it: Adam a step further along the mean; the decay is part of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers import _adam
from apps.training.optimizers._base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


class NAdam(Optimizer):
    """As Adam, with m̂ = β1·m / (1−β1^(t+1)) + (1−β1)·g / (1−β1^t) after m has taken g in; g ← g + λ·p before."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=nadam`."""

        lr: float = setting(1e-3, "peak learning rate", above=0)
        weight_decay: float = setting(0.1, "λ, added to the gradient; norms and biases are exempt", at_least=0)
        beta1: float = setting(0.9, "decay of the gradient's running mean", at_least=0, below=1)
        beta2: float = setting(0.999, "decay of the squared gradient's running mean", at_least=0, below=1)
        eps: float = setting(1e-8, "added to the denominator", at_least=0)

    state_names = _adam.STATE_NAMES
    hyperparameter_names = _adam.HYPERPARAMETER_NAMES
    hyperparameters = staticmethod(_adam.hyperparameters)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        gradient = gradient + hyper["weight_decay"] * parameter
        step, new_state = _adam.step_along(gradient, state, hyper, nesterov=True)
        return parameter - step, new_state
