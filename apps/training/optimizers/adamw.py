"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers import _adam
from apps.training.optimizers._base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


class AdamW(Optimizer):
    """m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²;  p = (1 − lr·λ)·p − lr · m̂ / (√v̂ + ε), hats bias-corrected."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=adamw`."""

        lr: float = setting(1e-3, "peak learning rate", above=0)
        weight_decay: float = setting(0.1, "decoupled decay; norms and biases are exempt", at_least=0)
        beta1: float = setting(0.9, "decay of the gradient's running mean", at_least=0, below=1)
        beta2: float = setting(0.999, "decay of the squared gradient's running mean", at_least=0, below=1)
        eps: float = setting(1e-8, "added to the denominator", at_least=0)
        nesterov: bool = setting(False, "look a step ahead along the mean; fixed by the artifact")

    structure = ("nesterov",)
    state_names = _adam.STATE_NAMES
    hyperparameter_names = _adam.HYPERPARAMETER_NAMES
    hyperparameters = staticmethod(_adam.hyperparameters)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step in torch.optim.AdamW's order of operations, so that the two differ by rounding only."""
        step, new_state = _adam.step_along(gradient, state, hyper, nesterov=self.fixed["nesterov"])
        return parameter * (1 - hyper["lr"] * hyper["weight_decay"]) - step, new_state
