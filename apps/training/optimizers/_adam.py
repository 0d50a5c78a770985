"""What Adam and its kin have in common: running means of the gradient and of its square, corrected for their start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

STATE_NAMES = ("exp_avg", "exp_avg_sq")
HYPERPARAMETER_NAMES = (
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


def hyperparameters(config: Any, step: int, lr: float, decayed: bool) -> dict[str, float]:
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


def step_along(
    gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor], *, nesterov: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """lr · m̂ / (√v̂ + ε) and the new state, in torch.optim.AdamW's order of operations.

    `nesterov`: m̂ = β1·m / (1−β1^(t+1)) + (1−β1)·g / (1−β1^t), a step further along the mean (Dozat, 2016).
    """
    exp_avg = hyper["beta1"] * state["exp_avg"] + hyper["one_minus_beta1"] * gradient
    exp_avg_sq = hyper["beta2"] * state["exp_avg_sq"] + hyper["one_minus_beta2"] * gradient * gradient
    denominator = exp_avg_sq.sqrt() / hyper["bias_correction2"].sqrt() + hyper["eps"]
    if nesterov:
        following = hyper["one_minus_beta1"] + hyper["beta1"] * hyper["bias_correction1"]  # 1 − β1^(t+1)
        mean = (hyper["beta1"] / following) * exp_avg
        mean = mean + (hyper["one_minus_beta1"] / hyper["bias_correction1"]) * gradient
        step = hyper["lr"] * (mean / denominator)
    else:
        step = (hyper["lr"] / hyper["bias_correction1"]) * (exp_avg / denominator)
    return step, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
