"""Linear layers of one module that read the same input, as one product over their weights one below the other.

Queries, keys and values, or a gated MLP's two first layers: their outputs are the rows' own dot products either way,
but x is read once instead of two or three times, and its gradient is one sum. Of layers that store other parameters
it is the matrix of them that x meets, W_in of two low-rank factors. A module names such layers in
`same_input` and calls them through `joint_linear`. Its parameters stay what they are; whoever calls the module with
`torch.func.functional_call` and has the weights as one tensor gives it as `joint_weight` (and `joint_bias`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backends.layers import BackendLinear, cast


def layers_of_one_input(module: nn.Module) -> list[BackendLinear]:
    """The layers that `module` calls through `joint_linear`, in order; none for most modules."""
    names: Sequence[str] = getattr(module, "same_input", ())
    return [module.get_submodule(name) for name in names]  # type: ignore[misc]


def may_be_one_product(layers: Sequence[BackendLinear]) -> bool:
    """Whether what x meets differs in nothing but its rows: one backend that allows it, one dtype, and so on.

    All of them are trained or none is, and each has a bias or none has. Layers that store other parameters need the
    same backend with any options: their ranks may differ.
    """
    first = layers[0]
    backend = first.backend
    allowed = backend.joins_rows if first.stored is None else backend.input_matrix is not None
    if not allowed or any(layer.state_specs or layer.lora_alpha is not None for layer in layers):
        return False
    return all(_kind(layer) == _kind(first) for layer in layers)


def joined_kinds(layer: BackendLinear) -> dict[str, str]:
    """Which of a layer's parameters can be part of `joint_weight` and `joint_bias`: kind → parameter's name."""
    if layer.stored is not None:
        matrix = layer.backend.input_matrix
        return {} if matrix is None else {"weight": matrix}
    return {kind: kind for kind in ("weight", "bias") if getattr(layer, kind) is not None}


def _kind(layer: BackendLinear) -> tuple[object, ...]:
    backend: object = layer.backend if layer.stored is None else type(layer.backend)
    taken = {kind: getattr(layer, name) for kind, name in joined_kinds(layer).items()}
    tensors = [(kind, each.dtype, each.requires_grad) for kind, each in taken.items()]
    return type(layer), layer.stored is None, backend, layer.compute_dtype, layer.in_features, tensors


def joint_linear(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """x [..., in] through each of the module's `same_input` layers: [..., out] each.

    With a `joint_weight`, the layers' matrices that x meets one below the other, they come from column ranges of one
    product.
    """
    layers = layers_of_one_input(module)
    weight, bias = getattr(module, "joint_weight", None), getattr(module, "joint_bias", None)
    if weight is None:
        return tuple(layer(x) for layer in layers)
    first = layers[0]
    x, weight = cast(x, first.compute_dtype), cast(weight, first.compute_dtype)
    if first.stored is not None:
        return _behind(layers, F.linear(x, weight))
    bias = None if bias is None else cast(bias, first.compute_dtype)
    y, _ = first.backend.linear(x, weight, bias, {}, training=first.training)
    return y.split([layer.out_features for layer in layers], -1)


def _behind(layers: Sequence[BackendLinear], product: Tensor) -> tuple[Tensor, ...]:
    """Each layer's output from its columns of the joint product."""
    names = [joined_kinds(layer)["weight"] for layer in layers]
    rows = [layer.stored[name][0] for layer, name in zip(layers, names, strict=True) if layer.stored is not None]
    outputs = []
    for layer, name, columns in zip(layers, names, product.split(rows, -1), strict=True):
        others = [each for each in layer.stored or () if each != name]
        weight = {each: cast(getattr(layer, each), layer.compute_dtype) for each in others}
        outputs.append(layer.backend.behind_input_matrix(columns, weight))
    return tuple(outputs)
