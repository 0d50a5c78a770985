"""Linear layers of one module that read the same input, as one product over their weights one below the other.

Queries, keys and values, or a gated MLP's two first layers: their outputs are the rows' own dot products either way,
but x is read once instead of two or three times, and its gradient is one sum. A module names such layers in
`same_input` and calls them through `joint_linear`. Its parameters stay what they are; whoever calls the module with
`torch.func.functional_call` and has the weights as one tensor gives it as `joint_weight` (and `joint_bias`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from backends.layers import BackendLinear, cast


def layers_of_one_input(module: nn.Module) -> list[BackendLinear]:
    """The layers that `module` calls through `joint_linear`, in order; none for most modules."""
    names: Sequence[str] = getattr(module, "same_input", ())
    return [module.get_submodule(name) for name in names]  # type: ignore[misc]


def may_be_one_product(layers: Sequence[BackendLinear]) -> bool:
    """Whether the layers' weights differ in nothing but their rows: one backend that allows it, one dtype, and so on.

    All of them are trained or none is, and each has a bias or none has.
    """
    first = layers[0]
    if not first.backend.joins_rows or any(layer.stored is not None or layer.state_specs for layer in layers):
        return False
    return all(layer.lora_alpha is None and _kind(layer) == _kind(first) for layer in layers)


def _kind(layer: BackendLinear) -> tuple[object, ...]:
    tensors = [(each.dtype, each.requires_grad) for each in (layer.weight, layer.bias) if each is not None]
    return type(layer), layer.backend, layer.compute_dtype, layer.in_features, tensors


def joint_linear(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """x [..., in] through each of the module's `same_input` layers: [..., out] each.

    With a `joint_weight` [sum of all out, in] they are column ranges of one product.
    """
    layers = layers_of_one_input(module)
    weight, bias = getattr(module, "joint_weight", None), getattr(module, "joint_bias", None)
    if weight is None:
        return tuple(layer(x) for layer in layers)
    first = layers[0]
    x, weight = cast(x, first.compute_dtype), cast(weight, first.compute_dtype)
    bias = None if bias is None else cast(bias, first.compute_dtype)
    y, _ = first.backend.linear(x, weight, bias, {}, training=first.training)
    return y.split([layer.out_features for layer in layers], -1)
