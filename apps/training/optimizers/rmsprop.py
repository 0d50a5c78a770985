"""RMSProp (Hinton, 2012): the gradient over its running root mean square, bias-corrected, with decoupled decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers._base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


class RMSProp(Optimizer):
    """v = ρ·v + (1−ρ)·g²;  p = (1 − lr·λ)·p − lr · g / (√(v / (1−ρ^t)) + ε)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=rmsprop`."""

        lr: float = setting(1e-3, "peak learning rate", above=0)
        weight_decay: float = setting(0.1, "decoupled decay; norms and biases are exempt", at_least=0)
        decay: float = setting(0.99, "decay of the squared gradient's running mean", at_least=0, below=1)
        eps: float = setting(1e-8, "added to the denominator", at_least=0)

    state_names = ("exp_avg_sq",)
    hyperparameter_names = ("lr", "decay", "one_minus_decay", "eps", "weight_decay", "bias_correction")

    @staticmethod
    def hyperparameters(config: Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of update `step` (from 1) at rate `lr`."""
        return {
            "lr": lr,
            "decay": config.decay,
            "one_minus_decay": 1.0 - config.decay,
            "eps": config.eps,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "bias_correction": 1.0 - config.decay**step,
        }

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        exp_avg_sq = hyper["decay"] * state["exp_avg_sq"] + hyper["one_minus_decay"] * gradient * gradient
        denominator = (exp_avg_sq / hyper["bias_correction"]).sqrt() + hyper["eps"]
        decayed = parameter * (1 - hyper["lr"] * hyper["weight_decay"])
        return decayed - hyper["lr"] * (gradient / denominator), {"exp_avg_sq": exp_avg_sq}
