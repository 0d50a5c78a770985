"""Adafactor (Shazeer & Stern, 2018, algorithms 4 and 6): a matrix's second moments as a row and a column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers._base import Optimizer, Shape

if TYPE_CHECKING:
    from torch import Tensor


class Adafactor(Optimizer):
    """v̂ = r cᵀ / mean(r), r and c running means of g² over columns and rows;  u = g / √v̂;
    p = (1 − lr·λ)·p − max(ε2, rms(p)) · min(lr, 1/√t) · u / max(1, rms(u)/d). As torch.optim.Adafactor.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=adafactor`."""

        lr: float = setting(1e-2, "peak learning rate, relative to a weight's root mean square", above=0)
        weight_decay: float = setting(0.0, "decoupled decay; norms and biases are exempt", at_least=0)
        beta2_decay: float = setting(-0.8, "the second moments' share of news at step t is t to this", at_most=0)
        eps1: float = setting(1e-7, "the least root of a second moment", above=0)
        eps2: float = setting(1e-3, "the least root mean square of a weight", above=0)
        clip: float = setting(1.0, "d, the greatest root mean square of an update", above=0)

    state_names = ("exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col")
    hyperparameter_names = ("lr", "rate", "weight_decay", "news", "eps1", "eps1_squared", "eps2", "clip")

    @classmethod
    def state_shapes(cls, shape: Shape) -> dict[str, Shape]:
        """A number for each row and each column of a matrix; of a vector, for each element."""
        if len(shape) < 2:
            return {"exp_avg_sq": shape}
        return {"exp_avg_sq_row": shape[:-1], "exp_avg_sq_col": (*shape[:-2], shape[-1])}

    @staticmethod
    def hyperparameters(config: Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of update `step` (from 1) at rate `lr`."""
        return {
            "lr": lr,
            "rate": min(lr, 1 / math.sqrt(step)),
            "weight_decay": config.weight_decay if decayed else 0.0,
            "news": float(step) ** config.beta2_decay,
            "eps1": config.eps1,
            "eps1_squared": config.eps1**2,
            "eps2": config.eps2,
            "clip": config.clip,
        }

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step."""
        squared = gradient.square()
        if gradient.ndim < 2:
            estimate = state["exp_avg_sq"].lerp(squared, hyper["news"])
            new = {"exp_avg_sq": estimate}
        else:
            row = state["exp_avg_sq_row"].lerp(squared.mean(-1), hyper["news"])
            column = state["exp_avg_sq_col"].lerp(squared.mean(-2), hyper["news"])
            mean = row.mean(-1, keepdim=True).maximum(hyper["eps1"])
            estimate = (row / mean)[..., :, None] * column[..., None, :]
            new = {"exp_avg_sq_row": row, "exp_avg_sq_col": column}
        step = gradient * estimate.maximum(hyper["eps1_squared"]).rsqrt()
        excess = (_rms(step) / hyper["clip"]).clamp_min(1.0)
        size = hyper["rate"] * _rms(parameter).maximum(hyper["eps2"])
        decayed = parameter * (1 - hyper["lr"] * hyper["weight_decay"])
        return decayed - (size / excess) * step, new


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()
