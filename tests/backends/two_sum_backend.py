"""A weight that is stored as two, whose gradients are one and the same."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, State


class TwoSum(Backend):
    """y = x (A + B)ᵀ + b."""

    def linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        return F.linear(x, weight["first"] + weight["second"], weight.get("bias")), state

    def parameter_spec(self, in_features: int, out_features: int, bias: bool) -> dict[str, tuple[int, ...]]:
        spec: dict[str, tuple[int, ...]] = dict.fromkeys(("first", "second"), (out_features, in_features))
        return spec | ({"bias": (out_features,)} if bias else {})

    def initial_parameters(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        parts = {"first": 0.75 * weight, "second": 0.25 * weight}
        return parts | ({} if bias is None else {"bias": bias.clone()})
