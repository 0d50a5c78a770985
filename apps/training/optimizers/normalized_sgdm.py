"""Momentum of length one: SGDM's direction divided by its Frobenius norm (Cutkosky & Mehta, 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from apps.training.config_schema import setting
from apps.training.optimizers import _momentum
from apps.training.optimizers._base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-30  # a direction of zeros stays one


class NormalizedSGDM(Optimizer):
    """m = β·m + g;  u = m, or Nesterov's g + β·m;  p = (1 − lr·λ)·p − lr · u / ‖u‖, of each tensor or of all."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=normalized_sgdm`."""

        lr: float = setting(0.05, "peak learning rate", above=0)
        momentum: float = setting(0.95, "decay of the gradients' running sum", at_least=0, below=1)
        nesterov: bool = setting(True, "look a step ahead along the sum")
        weight_decay: float = setting(0.0, "decoupled decay; norms and biases are exempt", at_least=0)
        normalize: Literal["layer", "global"] = setting(
            "layer", "one norm for each tensor or for all; fixed by the artifact"
        )

    structure = ("normalize",)
    state_names = ("momentum",)
    hyperparameter_names = _momentum.HYPERPARAMETER_NAMES
    hyperparameters = staticmethod(_momentum.hyperparameters)

    @property
    def total_names(self) -> tuple[str, ...]:
        return ("squares",) if self.fixed["normalize"] == "global" else ()

    def totals(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The direction's squares."""
        return {"squares": _momentum.direction(gradient, state["momentum"], hyper)[0].square().sum()}

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        direction, momentum = _momentum.direction(gradient, state["momentum"], hyper)
        squares = direction.square().sum() if self.fixed["normalize"] == "layer" else hyper["squares"]
        length = squares.sqrt().clamp_min(TINY)
        decayed = parameter * (1 - hyper["lr"] * hyper["weight_decay"])
        return decayed - (hyper["lr"] / length) * direction, {"momentum": momentum}
