"""Low-rank layers back to plain weights, for programs that know no low rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from backends.errors import UserError
from backends.layers import BackendLinear

# The config's word for "these linears have biases": all of a block's, or none.
BIASES = {"attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp_bias": ("gate_proj", "up_proj", "down_proj")}


@torch.no_grad()
def expand_model(model: nn.Module) -> tuple[str, ...]:
    """Multiply low-rank layers into plain weights, in place, rounded once; the names of the layers.

    Where compression gave some of a Llama's linears a bias, its config says so from now on, and those without one get
    zeros: transformers knows biases for all attention projections or none, and likewise for the MLP. UserError when
    there is nothing to expand, and for a bias that the config cannot tell of; the model is as it was then.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BackendLinear) and layer.stored is not None and "weight_in" in layer.stored
    }
    if not layers:
        raise UserError("The model has no low-rank layer: it is a plain one already.")
    config: Any = getattr(model, "config", None)
    flags: list[str] = []
    without: list[nn.Linear] = []
    for flag, ends in BIASES.items():
        linears = [part for name, part in model.named_modules() if name.rpartition(".")[2] in ends]
        if hasattr(config, flag) and any(part.bias is not None for part in linears):
            flags.append(flag)
            without += [part for part in linears if isinstance(part, nn.Linear) and part.bias is None]
    if isinstance(model, PreTrainedModel):
        _require_biases(model, flags, layers)
    for layer in layers.values():
        first, second = layer.get_parameter("weight_in"), layer.get_parameter("weight_out")
        wide = torch.promote_types(first.dtype, torch.float32)
        layer.hold_weight((second.to(wide) @ first.to(wide)).to(first.dtype))
    for flag in flags:
        setattr(config, flag, True)
    for part in without:
        part.bias = nn.Parameter(part.weight.new_zeros(part.out_features))
    return tuple(layers)


def _require_biases(model: PreTrainedModel, flags: Sequence[str], layers: Mapping[str, BackendLinear]) -> None:
    """UserError for a bias that a model built of the config, with `flags` set, has not: who reads it would drop it."""
    config = copy.deepcopy(model.config)
    for flag in flags:
        setattr(config, flag, True)
    with torch.device("meta"):
        plain = dict(type(model)(config).named_modules())
    for name, layer in layers.items():
        if layer.bias is not None and getattr(plain.get(name), "bias", layer.bias) is None:
            raise UserError(
                f"Layer '{name}' got a bias from compression, and {type(config).__name__} has no setting for one. "
                "Compress the dense model with method svd_llm, which adds none."
            )
