"""What optimizers with heavy-ball momentum have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

HYPERPARAMETER_NAMES = ("lr", "momentum", "gradient_share", "momentum_share", "weight_decay")


def hyperparameters(config: Any, step: int, lr: float, decayed: bool) -> dict[str, float]:
    """The numbers of any update at rate `lr`. Nesterov's is a number too, so that one artifact serves both."""
    return {
        "lr": lr,
        "momentum": config.momentum,
        "gradient_share": 1.0 if config.nesterov else 0.0,
        "momentum_share": config.momentum if config.nesterov else 1.0,
        "weight_decay": config.weight_decay if decayed else 0.0,
    }


def direction(gradient: Tensor, momentum: Tensor, hyper: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The direction and the new momentum β·m + g: the momentum itself, or Nesterov's g + β·m."""
    momentum = hyper["momentum"] * momentum + gradient
    return hyper["gradient_share"] * gradient + hyper["momentum_share"] * momentum, momentum
