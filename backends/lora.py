"""LoRA (arXiv 2106.09685): the weights stay, a low-rank update of them is trained: W' = W + α/r · B A.

The backend of a layer gets W' as one matrix, so a backend that rounds weights rounds the sum, and its gradient dW'
gives dB = α/r · dW' Aᵀ and dA = α/r · Bᵀ dW'. B starts at zero: the first forward is that of the model without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from backends.errors import UserError
from backends.layers import BackendLinear, unfuse
from backends.routing import layers_of
from backends.routing_rules import HEAD, is_head
from backends.routing_table import shorten
from backends.seeding import generator_of
from backends.state import device_of


@dataclass(frozen=True)
class Lora:
    """Updates of rank `r`, scaled by `alpha` / `r`, of the linear layers called `layers`."""

    r: int
    alpha: float
    layers: tuple[str, ...]
    train_norms: bool = False


def add_lora(
    model: nn.Module,
    r: int,
    alpha: float = 32.0,
    match: str | Sequence[str] | None = None,
    *,
    train_norms: bool = False,
    seed: int = 42,
) -> Lora:
    """Freeze `model` and give its linear layers trained A [r, in] and B [out, r], in place, in the weights' dtype.

    `match`: globs over full layer names, or the ends of names (`q_proj`); None: every linear but the head. A is uniform
    in ±1/√in (kaiming_uniform with a = √5), drawn from `seed` and its name alone; B is zero. `train_norms`: the norms'
    parameters stay trained. Plain nn.Linear layers become `BackendLinear`. A UserError leaves the model as it was.
    """
    if r < 1 or not math.isfinite(alpha) or alpha == 0:
        raise UserError(f"LoRA has r={r} and alpha={alpha}. Expected r at least 1 and a finite alpha other than 0.")
    layers = matching_linears(model, match, "LoRA")
    for name, layer in layers.items():
        _check(model, name, layer, r)
    norms = norm_parameters(model) if train_norms else {}
    if train_norms and not norms:
        raise UserError("train_norms was asked for, and the model has no norm with parameters. Leave it out.")
    model.requires_grad_(False)
    for parameter in norms.values():
        parameter.requires_grad_(True)
    unfuse(model)
    for name, layer in layers.items():
        if not isinstance(layer, BackendLinear):
            layer = BackendLinear.adopt(layer)
        _add(layer, name, r, alpha, seed)
    return Lora(r, float(alpha), tuple(layers), train_norms)


def lora_layers(model: nn.Module) -> dict[str, BackendLinear]:
    """The layers that have an update, by name."""
    modules = model.named_modules()
    return {name: part for name, part in modules if isinstance(part, BackendLinear) and part.lora_alpha is not None}


def merge_lora(model: nn.Module) -> tuple[str, ...]:
    """Fold every update into its weight, summed in at least float32 and rounded once; the names of the layers.

    A and B are gone then, and the model is a plain one. What was frozen stays so: `model.requires_grad_()` trains all.
    """
    layers = lora_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            compute_dtype, layer.compute_dtype = layer.compute_dtype, layer.weight.dtype
            layer.weight.copy_(layer.effective_weight())
            layer.compute_dtype = compute_dtype
            del layer.lora_A, layer.lora_B, layer.lora_alpha
    return tuple(layers)


def matching_linears(model: nn.Module, match: str | Sequence[str] | None, asker: str) -> dict[str, nn.Linear]:
    """The linear layers that patterns name, in the model's order; a UserError of `asker` for one that names none.

    As for backends, the head is named only by a pattern that spells `lm_head`.
    """
    linears = [name for name, info in layers_of(model).items() if info.kind == "linear"]
    if match is None:
        chosen = {name for name in linears if not is_head(name)}
        if not chosen:
            raise UserError(
                f"{asker} has no layer: the model has no linear layer beside the head. Name layers with match."
            )
    else:
        chosen = set()
        for pattern in [match] if isinstance(match, str) else match:
            named = {name for name in linears if names_layer(pattern, name)}
            if not named:
                shown = ", ".join(shorten(linears)[:3]) or "none"
                raise UserError(f"{asker}'s pattern '{pattern}' names no linear layer. The model has these: {shown}.")
            chosen |= named
        if not chosen:
            raise UserError(f"{asker}'s match is an empty list. Expected patterns of layers, or null for all of them.")
    found = {name: model.get_submodule(name) for name in linears if name in chosen}
    return {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model's norms (modules whose class is called so), by name."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, part in model.named_modules()
        if "norm" in type(part).__name__.lower()
        for name, parameter in part.named_parameters(recurse=False)
    }


def trained_parameters(model: nn.Module) -> dict[str, Tensor]:
    """What a model with updates trains, by name: A, B and, where asked for, norms."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_lora(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy values into trained parameters by name; UserError where names or shapes are not the model's."""
    targets = trained_parameters(model)
    for name in sorted(tensors.keys() - targets.keys()):
        raise UserError(f"The adapter has {name}, which the model does not train. Use the adapter of this model.")
    for name, values in tensors.items():
        if values.shape != targets[name].shape:
            raise UserError(
                f"The adapter's {name} has shape {list(values.shape)}, the model's {list(targets[name].shape)}. "
                "Use the adapter of this model."
            )
    with torch.no_grad():
        for name, values in tensors.items():
            targets[name].copy_(values)


def names_layer(pattern: str, layer: str) -> bool:
    """Whether a glob over full names, or the end of one, names the layer."""
    fits = fnmatchcase(layer, pattern) or layer.endswith(f".{pattern}")
    return fits and (HEAD in pattern or not is_head(layer))


def _check(model: nn.Module, name: str, layer: nn.Linear, r: int) -> None:
    """Whether the layer can have an update of rank `r`."""
    if isinstance(layer, BackendLinear) and layer.stored is not None:
        raise UserError(
            f"LoRA updates a weight, and layer '{name}' stores {', '.join(layer.stored)} for backend {layer.backend}. "
            "Leave it out of match, or compute it with another backend."
        )
    if isinstance(layer, BackendLinear) and layer.lora_alpha is not None:
        raise UserError(f"Layer '{name}' has a low-rank update already. Merge it first: merge_lora(model).")
    if r > min(layer.in_features, layer.out_features):
        raise UserError(
            f"LoRA has r={r}, more than the smaller side of layer '{name}' ({layer.out_features} × "
            f"{layer.in_features}). Lower r, or leave the layer out of match."
        )
    users = [path for path, part in model.named_modules() if getattr(part, "weight", None) is layer.weight]
    if len(users) > 1:
        raise UserError(
            f"Layer '{name}' shares its weight with '{next(path for path in users if path != name)}', and an update of "
            "one would not be one of the other. Leave it out of match."
        )


def _add(layer: BackendLinear, name: str, r: int, alpha: float, seed: int) -> None:
    device, dtype = device_of(layer), layer.weight.dtype
    if layer.weight.is_meta:
        values = torch.empty(r, layer.in_features, dtype=dtype, device=device)
    else:
        bound = layer.in_features**-0.5
        values = torch.empty(r, layer.in_features)
        values.uniform_(-bound, bound, generator=generator_of(seed, f"{name}.lora_A"))
        values = values.to(device=device, dtype=dtype)
    layer.lora_A = nn.Parameter(values)
    layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, r, dtype=dtype, device=device))
    layer.lora_alpha = float(alpha)
