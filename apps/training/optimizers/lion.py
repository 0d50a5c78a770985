"""Lion (Chen et al., 2023, algorithm 2): the sign of a momentum, with decoupled decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers._base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


class Lion(Optimizer):
    """p = (1 − lr·λ)·p − lr · sign(β1·m + (1−β1)·g);  m = β2·m + (1−β2)·g."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=lion`."""

        lr: float = setting(1e-4, "peak learning rate", above=0)
        weight_decay: float = setting(0.1, "decoupled decay; norms and biases are exempt", at_least=0)
        beta1: float = setting(0.9, "share of the running mean in the sign", at_least=0, below=1)
        beta2: float = setting(0.99, "decay of the gradient's running mean", at_least=0, below=1)

    state_names = ("exp_avg",)
    hyperparameter_names = ("lr", "beta1", "beta2", "one_minus_beta1", "one_minus_beta2", "weight_decay")

    @staticmethod
    def hyperparameters(config: Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of any update at rate `lr`."""
        return {
            "lr": lr,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "one_minus_beta1": 1.0 - config.beta1,
            "one_minus_beta2": 1.0 - config.beta2,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        sign = (hyper["beta1"] * state["exp_avg"] + hyper["one_minus_beta1"] * gradient).sign()
        exp_avg = hyper["beta2"] * state["exp_avg"] + hyper["one_minus_beta2"] * gradient
        decayed = parameter * (1 - hyper["lr"] * hyper["weight_decay"])
        return decayed - hyper["lr"] * sign, {"exp_avg": exp_avg}
