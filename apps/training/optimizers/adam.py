"""Adam (Kingma & Ba, 2015, algorithm 1) with L2 regularization: the decay is part of the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apps.training.config_schema import setting
from apps.training.optimizers import _adam
from apps.training.optimizers._base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


class Adam(Optimizer):
    """g ← g + λ·p;  m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²;  p ← p − lr · m̂ / (√v̂ + ε), hats bias-corrected."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=adam`."""

        lr: float = setting(1e-3, "peak learning rate", above=0)
        weight_decay: float = setting(0.1, "λ, added to the gradient; norms and biases are exempt", at_least=0)
        beta1: float = setting(0.9, "decay of the gradient's running mean", at_least=0, below=1)
        beta2: float = setting(0.999, "decay of the squared gradient's running mean", at_least=0, below=1)
        eps: float = setting(1e-8, "added to the denominator", at_least=0)

    looks_ahead: ClassVar[bool] = False  # along the mean, as NAdam does
    state_names = _adam.STATE_NAMES
    hyperparameter_names = _adam.HYPERPARAMETER_NAMES
    hyperparameters = staticmethod(_adam.hyperparameters)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        gradient = gradient + hyper["weight_decay"] * parameter
        step, new_state = _adam.step_along(gradient, state, hyper, nesterov=self.looks_ahead)
        return parameter - step, new_state
