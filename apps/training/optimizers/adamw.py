"""AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, 2019, algorithm 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from apps.training.optimizers._base import Optimizer
from backends.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class AdamW(Optimizer):
    """m = β1·m + (1−β1)·g;  v = β2·v + (1−β2)·g²;  p = (1 − lr·λ)·p − lr · m̂ / (√v̂ + ε), hats bias-corrected."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=adamw`."""

        lr: float = field(default=3e-4, metadata={"help": "peak learning rate"})
        weight_decay: float = field(default=0.1, metadata={"help": "decoupled decay; norms and biases are exempt"})
        beta1: float = field(default=0.9, metadata={"help": "decay of the gradient's running mean"})
        beta2: float = field(default=0.95, metadata={"help": "decay of the squared gradient's running mean"})
        eps: float = field(default=1e-8, metadata={"help": "added to the denominator"})

        def __post_init__(self) -> None:
            if not self.lr > 0.0:
                raise UserError(f"optimizer.lr={self.lr} is not possible. Expected a rate above 0.")
            for name in ("beta1", "beta2"):
                if not 0.0 <= getattr(self, name) < 1.0:
                    raise UserError(f"optimizer.{name}={getattr(self, name)} is not possible. Expected 0 up to below 1.")
            for name in ("weight_decay", "eps"):
                if not getattr(self, name) >= 0.0:
                    raise UserError(f"optimizer.{name}={getattr(self, name)} is not possible. Expected 0 or more.")

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
