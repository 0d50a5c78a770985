"""A backend whose ranges are those of the steps before and whose noise counts rows of the step, for tests only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, State, StateSpec


class DelayedBackend(Backend):
    """Clamps inputs to the range known before the step, and adds to each output a number that its place decides."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        known = state["least"] <= state["most"]
        clamped = torch.where(known, x.clamp(state["least"].to(x.dtype), state["most"].to(x.dtype)), x)
        y = F.linear(clamped, weight, bias)
        places = torch.arange(y.numel(), device=y.device) + state["first_row"] * (y.numel() // y.shape[0])
        noise = torch.sin((places + state["step"] * 7919 + state["layer"] % 1009).to(y.dtype)).view(y.shape)
        observed = x.detach()
        new_state = {
            "least": torch.minimum(state["least"], observed.amin().float() * 0.5),
            "most": torch.maximum(state["most"], observed.amax().float() * 0.5),
            "mean": 0.9 * state["mean"] + 0.1 * observed.mean().float(),
            "step": state["step"] + 1,
        }
        return y + 1e-2 * noise, new_state

    def linear_state(self, in_features: int, out_features: int) -> dict[str, StateSpec]:
        return {
            "least": StateSpec((), fill=float("inf"), reduce="min"),
            "most": StateSpec((), fill=float("-inf"), reduce="max"),
            "mean": StateSpec(()),
            "step": StateSpec((), "int64", reduce="max"),
            "first_row": StateSpec((), "int64", given="first_row"),
            "layer": StateSpec((), "int64", given="layer"),
        }
