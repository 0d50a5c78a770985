"""Layers of one input: alone, or as one product of weights given together."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from backends.joint import joint_linear, layers_of_one_input, may_be_one_product
from backends.layers import BackendLinear
from backends.lora import add_lora
from backends.lowrank import Lowrank
from tests.backends.stateful_backend import ScaledBackend


class Three(nn.Module):
    same_input = ("one", "two", "three")

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.three = (BackendLinear(5, rows, bias=bias) for rows in (4, 2, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return joint_linear(self, x)


def test_only_a_module_that_names_them_has_layers_of_one_input() -> None:
    module = Three()
    assert layers_of_one_input(module) == [module.one, module.two, module.three]
    assert layers_of_one_input(module.one) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_one_product_gives_each_layers_output_and_gradients(bias: bool, dtype: torch.dtype | None) -> None:
    torch.manual_seed(1)
    module = Three(bias)
    layers = layers_of_one_input(module)
    for layer in layers:
        layer.compute_dtype = dtype
    x = torch.randn(2, 3, 5, requires_grad=True)
    kinds = ["weight", "bias"] if bias else ["weight"]
    joint = {f"joint_{kind}": torch.cat([getattr(layer, kind) for layer in layers]) for kind in kinds}

    def plain(layer: nn.Linear) -> Tensor:
        return nn.functional.linear(*(each.to(dtype or each.dtype) for each in (x, *layer.parameters())))

    expected = tuple(plain(layer) for layer in layers)
    leaves, upstream = [x, *module.parameters()], [torch.randn_like(each) for each in expected]
    gradients = torch.autograd.grad(expected, leaves, upstream)
    for outputs in (module(x), torch.func.functional_call(module, joint, (x,))):
        torch.testing.assert_close(outputs, expected)
        torch.testing.assert_close(torch.autograd.grad(outputs, leaves, upstream), gradients)
    assert not hasattr(module, "joint_weight")


def lora(module: Three) -> None:
    add_lora(module, r=2, match="two")


def another_class(module: Three) -> None:
    module.two.__class__ = type("Noisy", (BackendLinear,), {})


def low_rank(module: Three, *ranks: int, bias: bool = False) -> Three:
    for layer, rank in zip(layers_of_one_input(module), ranks, strict=True):
        layer.set_backend(Lowrank(Lowrank.Config(rank=rank, bias=bias)))
    return module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_of_factors_the_first_ones_are_one_product(bias: bool, dtype: torch.dtype | None) -> None:
    torch.manual_seed(2)
    module = low_rank(Three(), 3, 1, 2, bias=bias)
    layers = layers_of_one_input(module)
    assert may_be_one_product(layers)
    for layer in layers:
        layer.compute_dtype = dtype
    x = torch.randn(2, 3, 5, requires_grad=True)
    stored = [
        {name: getattr(layer, name).to(dtype or torch.float32) for name in layer.stored or ()} for layer in layers
    ]
    wide = x.to(dtype or x.dtype)
    expected = tuple(wide @ (s["weight_out"] @ s["weight_in"]).T + s.get("bias", 0) for s in stored)
    leaves, upstream = [x, *module.parameters()], [torch.randn_like(each) for each in expected]
    gradients = torch.autograd.grad(expected, leaves, upstream)
    joint = {"joint_weight": torch.cat([layer.weight_in for layer in layers])}
    for outputs in (module(x), torch.func.functional_call(module, joint, (x,))):
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(outputs, leaves, upstream), gradients, rtol=1e-5, atol=1e-5)


def test_factors_are_not_joined_with_a_matrix_or_with_frozen_ones() -> None:
    module = low_rank(Three(), 2, 2, 2)
    module.two.requires_grad_(False)
    assert not may_be_one_product(layers_of_one_input(module))
    module = Three()
    module.two.set_backend(Lowrank(Lowrank.Config(rank=2)))
    assert not may_be_one_product(layers_of_one_input(module))
    assert not may_be_one_product([module.two, module.one])


CHANGES: dict[str, Callable[[Three], object]] = {
    "another backend": lambda module: module.two.set_backend(ScaledBackend()),
    "all of a backend that does not say so": lambda module: [
        layer.set_backend(ScaledBackend()) for layer in layers_of_one_input(module)
    ],
    "no bias": lambda module: module.two.register_parameter("bias", None),
    "frozen": lambda module: module.two.requires_grad_(False),
    "a frozen bias": lambda module: module.two.bias.requires_grad_(False),
    "another dtype": lambda module: module.two.double(),
    "another compute dtype": lambda module: setattr(module.two, "compute_dtype", torch.float64),
    "a low-rank update": lora,
    "another class": another_class,
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_differ_stay_alone(change: str) -> None:
    module = Three(bias=True)
    assert may_be_one_product(layers_of_one_input(module))
    CHANGES[change](module)
    assert not may_be_one_product(layers_of_one_input(module))


def test_frozen_layers_may_be_one_product() -> None:
    assert may_be_one_product(layers_of_one_input(Three().requires_grad_(False)))
