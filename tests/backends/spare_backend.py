"""A stored tensor that no product reads."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, State


class Spare(Backend):
    """y = x Wᵀ + b, beside a scale that nothing asks for."""

    def linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        return F.linear(x, weight["matrix"], weight.get("bias")), state

    def parameter_spec(self, in_features: int, out_features: int, bias: bool) -> dict[str, tuple[int, ...]]:
        spec: dict[str, tuple[int, ...]] = {"matrix": (out_features, in_features), "spare": (out_features,)}
        return spec | ({"bias": (out_features,)} if bias else {})

    def initial_parameters(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        parts = {"matrix": weight.clone(), "spare": weight.new_ones(len(weight))}
        return parts | ({} if bias is None else {"bias": bias.clone()})
