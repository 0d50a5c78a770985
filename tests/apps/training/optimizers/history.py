"""A rule that remembers: its new state holds tensors that it was given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


class History(Optimizer):
    """p = p − lr · (g + g₋₁ / 2 + g₋₂ / 4) + (p − p₋₁) / 8, the gradients and weights of the steps before."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of the optimizer."""

        lr: float = setting(0.1, "learning rate", above=0)

    state_names = ("last", "before", "weight")
    hyperparameter_names = ("lr",)

    @staticmethod
    def hyperparameters(config: Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        return {"lr": lr}

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction = gradient + state["last"] / 2 + state["before"] / 4
        moved = parameter - hyper["lr"] * direction + (parameter - state["weight"]) / 8
        return moved, {"last": gradient, "before": state["last"], "weight": parameter}
