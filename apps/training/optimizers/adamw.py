"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers._base import Optimizer

if TYPE_CHECKING:
    from torch import Tensor


class AdamW(Optimizer):
    """m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²;  p = (1 − lr·λ)·p − lr · m̂ / (√v̂ + ε), hats bias-corrected."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=adamw`."""

        lr: float = setting(3e-4, "peak learning rate", above=0)
        weight_decay: float = setting(0.1, "decoupled decay; norms and biases are exempt", at_least=0)
        beta1: float = setting(0.9, "decay of the gradient's running mean", at_least=0, below=1)
        beta2: float = setting(0.95, "decay of the squared gradient's running mean", at_least=0, below=1)
        eps: float = setting(1e-8, "added to the denominator", at_least=0)

    state_names = ("exp_avg", "exp_avg_sq")
    hyperparameter_names = (
        "lr",
        "beta1",
        "beta2",
        "one_minus_beta1",
        "one_minus_beta2",
        "eps",
        "weight_decay",
        "bias_correction1",
        "bias_correction2",
    )

    @staticmethod
    def hyperparameters(config: Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of update `step` (from 1) at rate `lr`.

        1−β is passed beside β: taken in float32, 1 − 0.999 is off by 1e-5 of itself.
        """
        return {
            "lr": lr,
            "beta1": config.beta1,
            "beta2": config.beta2,
            "one_minus_beta1": 1.0 - config.beta1,
            "one_minus_beta2": 1.0 - config.beta2,
            "eps": config.eps,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "bias_correction1": 1.0 - config.beta1**step,
            "bias_correction2": 1.0 - config.beta2**step,
        }

    @staticmethod
    def update(
        parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step in torch.optim.AdamW's order of operations, so that the two differ by rounding only."""
        exp_avg = hyper["beta1"] * state["exp_avg"] + hyper["one_minus_beta1"] * gradient
        exp_avg_sq = hyper["beta2"] * state["exp_avg_sq"] + hyper["one_minus_beta2"] * gradient * gradient
        denominator = exp_avg_sq.sqrt() / hyper["bias_correction2"].sqrt() + hyper["eps"]
        decayed = parameter * (1 - hyper["lr"] * hyper["weight_decay"])
        new_parameter = decayed - (hyper["lr"] / hyper["bias_correction1"]) * (exp_avg / denominator)
        return new_parameter, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
