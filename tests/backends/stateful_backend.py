"""A backend with state, for tests only: inputs are rounded to `levels` steps of a running largest magnitude."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, State, StateSpec
from backends.errors import UserError


class ScaledBackend(Backend):
    """Rounds the first operand; the backward is that of the plain product. State: `max_abs` and a `step` count."""

    gradient = "straight-through"

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        levels: int = 256

        def __post_init__(self) -> None:
            if self.levels < 2:
                raise UserError(f"levels is {self.levels}. Expected at least 2.")

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        rounded, new_state = self._round(x, state, training)
        plain = F.linear(x, weight, bias)
        return plain + (F.linear(rounded, weight, bias) - plain).detach(), new_state

    def matmul(self, a: Tensor, b: Tensor, state: State, *, training: bool = False) -> tuple[Tensor, State]:
        rounded, new_state = self._round(a, state, training)
        plain = a @ b
        return plain + (rounded @ b - plain).detach(), new_state

    def linear_state(self, in_features: int, out_features: int) -> dict[str, StateSpec]:
        return self.matmul_state()

    def matmul_state(self) -> dict[str, StateSpec]:
        return {"max_abs": StateSpec((), reduce="max"), "step": StateSpec((), "int64", reduce="max")}

    def _round(self, x: Tensor, state: State, training: bool) -> tuple[Tensor, State]:
        largest = state["max_abs"]
        if training:
            largest = torch.maximum(largest, x.detach().abs().amax().to(largest.dtype))
        step = (largest / (self.config.levels // 2)).clamp_min(1e-12).to(x.dtype)
        rounded = torch.round(x.detach() / step) * step
        return rounded, {"max_abs": largest, "step": state["step"] + 1}
