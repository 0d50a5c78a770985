"""On a GPU: the kernels against float64, alone and in a captured and compiled region."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends import load
from benchmarks.optical_kernels import Products, compiled_step

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def layer_and_inputs(
    heads: int, groups: int, queries: int, keys: int, head_dim: int
) -> tuple[Products, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = Products(heads, head_dim)
    layer.set_backend(load("optical"))
    sizes = {"q": (queries, heads), "k": (keys, groups), "v": (keys, groups)}
    inputs = {
        name: torch.randn(2, *size, head_dim, device="cuda", dtype=torch.bfloat16) for name, size in sizes.items()
    }
    return layer.cuda().train(), inputs


def attend(
    layer: Products, inputs: dict[str, Tensor], mask: Tensor | None = None, grad: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """out [B, H, S, D], and the gradients for q, k and v of a fixed random sum of it."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    q, k, v = (leaf.transpose(1, 2) for leaf in leaves.values())
    out = layer.attend(q, k, v, mask=mask, scale=layer.head_dim**-0.5)
    if grad is None:
        torch.manual_seed(1)
        grad = torch.randn(out.shape, device="cuda", dtype=torch.bfloat16)
    return out.detach(), list(torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype)))


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize(
    ("heads", "groups", "queries", "keys", "head_dim"),
    [(4, 4, 256, 256, 64), (8, 2, 333, 333, 64), (4, 1, 201, 201, 128), (2, 2, 1, 77, 64), (6, 2, 130, 190, 64)],
)
def test_output_ranges_and_gradients_are_those_of_float64(
    heads: int, groups: int, queries: int, keys: int, head_dim: int, calibrated: bool
) -> None:
    layer, inputs = layer_and_inputs(heads, groups, queries, keys, head_dim)
    if calibrated:
        attend(layer, inputs)
    reference = copy.deepcopy(layer)
    out, gradients = attend(layer, inputs)
    expected, expected_gradients = attend(reference, {name: tensor.double() for name, tensor in inputs.items()})
    if calibrated:
        levels = (reference.out_max - reference.out_min).item() / 255
        error = (out.double() - expected).abs() / levels
        # bfloat16 holds the 255 levels to half a level; the rest are roundings that fall on the other side
        assert error.mean() < 0.3
        assert (error > 3).double().mean() < 1e-3
    else:
        assert relative(out, expected) < 5e-3
    for value, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(value, wanted) < 2e-2
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name), rtol=2e-2, atol=2e-3)


def test_articles_do_not_see_each_other() -> None:
    layer, inputs = layer_and_inputs(4, 2, 300, 300, 64)
    ids = torch.arange(300, device="cuda").expand(2, 300) // torch.tensor([[70], [110]], device="cuda")
    mask = (ids[:, None, :, None] == ids[:, None, None, :]) & torch.ones(300, 300, device="cuda").tril().bool()
    attend(layer, inputs, mask)
    reference = copy.deepcopy(layer)
    out, gradients = attend(layer, inputs, mask)
    expected, expected_gradients = attend(reference, {name: x.double() for name, x in inputs.items()}, mask)
    levels = (reference.out_max - reference.out_min).item() / 255
    assert ((out.double() - expected).abs() / levels).mean() < 0.3
    for value, wanted in zip(gradients, expected_gradients, strict=True):
        assert relative(value, wanted) < 2e-2


def test_two_runs_give_the_same_bits() -> None:
    layer, inputs = layer_and_inputs(8, 2, 512, 512, 64)
    attend(layer, inputs)
    again = copy.deepcopy(layer)
    first, second = attend(layer, inputs), attend(again, inputs)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.slow
def test_a_compiled_region_gives_what_eager_gives(tmp_path: Path) -> None:
    layer, inputs = layer_and_inputs(8, 2, 333, 333, 64)
    attend(layer, inputs)
    step, grad = compiled_step(layer, inputs, tmp_path)
    results = step(grad)
    out, gradients = attend(layer, inputs, grad=grad)
    torch.testing.assert_close(results["output"], out, rtol=0, atol=0.05)
    for name, wanted in zip(inputs, gradients, strict=True):
        assert relative(results[f"grad_{name}"], wanted) < 1e-2
