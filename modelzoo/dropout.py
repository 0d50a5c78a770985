"""Dropout whose mask is counted, not drawn: a function of (seed, step, layer, row of the step, position in the row).

So a resumed run, an activation computed again, and any dealing of a step's rows to workers and microbatches have the
same mask. The step counts in the layer's state, as a backend's does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backends.base import State, StateSpec
from backends.kernels.dither import indices, key_of, keyed, python_hash, random_bits
from backends.state import Stateful, device_of

STREAM = 2**16  # of key_of: backends use small ones


class Dropout(Stateful):
    """x [B, …] → x / (1 − p), and 0 in a share p of the elements; x itself in evaluation. p to within 2⁻²⁵."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        number = StateSpec((), "int64", reduce="max")
        given = {"first_row": StateSpec((), "int64", given="first_row"), "layer": StateSpec((), "int64", given="layer")}
        self.set_state({"step": number, "seed": number, **given}, None)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return self.call_with_state(lambda state: (drop(x, self.p, state), _after(state)))

    def extra_repr(self) -> str:
        return f"p={self.p}"


def drop(x: Tensor, p: float, state: State) -> Tensor:
    """x [B, …], of which the first row is row `first_row` of the step."""
    key = keyed(key_of(0, STREAM, state["step"] + (state["layer"] << 32)), state["seed"])
    # a key for each row: positions are numbered within one, so that no size of batch makes the numbers come again
    rows = (torch.arange(x.shape[0], device=x.device) + state["first_row"]).view(-1, *[1] * (x.ndim - 1))
    positions = indices((1, *x.shape[1:]), torch.zeros_like(state["first_row"]), 0)
    bits = random_bits(positions, keyed(key, rows)) >> 8  # in [−2²³, 2²³)
    return torch.where(bits >= round(p * 2**24) - 2**23, x * (1.0 / (1.0 - p)), 0.0)


def make_dropout(p: float) -> Dropout | None:
    """None for p = 0: there is then no layer, no state, and nothing in the compiled step."""
    return Dropout(p) if p else None


def name_dropouts(model: nn.Module) -> None:
    """Tell every dropout of the model which one it is."""
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.set_layer_name(name)


def seed_dropout(model: nn.Module, seed: int) -> None:
    """Let the masks of a new run follow from `seed`, from step 0 on."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.set_state(module.state_specs, device_of(model))
            module.get_buffer("seed").fill_(python_hash(seed, 0))


def _after(state: State) -> State:
    return {"step": state["step"] + 1, "seed": state["seed"]}
