"""On a GPU: fp8 products and the kernel that turns a matrix against the plain twin, alone and in a compiled region."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends import load
from backends.kernels import fp8_turned
from backends.kernels.fp8 import E4M3, E5M2, has_fp8_products, power_of_two
from backends.kernels.fp8_linear import Recipe, fp8_linear
from backends.layers import BackendLinear
from benchmarks.optical_kernels import compiled_step

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not has_fp8_products(torch.device("cuda")), reason="needs a GPU with fp8"
    ),
]
SHAPES = [(256, 512, 384), (1, 64, 48), (333, 100, 50), (4096, 1024, 2816)]  # tokens, in, out


@pytest.mark.parametrize("shape", [(16, 16), (144, 272), (4096, 1408)])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(
    ("given", "wanted"), [(E5M2, E5M2), (E4M3, E4M3), (torch.bfloat16, E4M3), (torch.float32, E4M3)]
)
def test_the_kernel_turns_and_rounds_as_the_twin_does(shape, by_row, given, wanted):
    torch.manual_seed(0)
    x = (torch.randn(shape) * torch.rand(shape[0], 1) * 50).to(given)
    factor = power_of_two(torch.randint(-20, 1, (shape[0] if by_row else 1, 1), dtype=torch.int32))
    expected = fp8_turned.turned(x, factor, wanted)
    found = fp8_turned.turned(x.cuda(), factor.cuda(), wanted)
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


def operands(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens, inputs, outputs = shape
    x = torch.randn(tokens, inputs) * 2.0 ** torch.randint(-3, 4, (tokens, 1))
    weight = torch.randn(outputs, inputs) * 0.02
    return x, weight, torch.randn(tokens, outputs) * 2.0 ** torch.randint(-30, -20, (tokens, 1))


def products(x: Tensor, weight: Tensor, grad: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = fp8_linear(*leaves, recipe)
    return y.detach(), *torch.autograd.grad(y, leaves, grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("grad_dtype", [E5M2, E4M3])
def test_products_differ_from_the_twins_by_the_order_of_sums(shape, dtype, by_row, grad_dtype):
    x, weight, grad = (one.to(dtype) for one in operands(shape))
    recipe = Recipe(grad_dtype, by_row, fp8_grad_weight=True, fast_forward=False, fast_backward=False)
    expected = products(x.double(), weight.double(), grad.double(), recipe)
    found = products(x.cuda(), weight.cuda(), grad.cuda(), recipe)
    x, weight, grad = (one.double().abs() for one in (x, weight, grad))
    for one, wide, size in zip(found, expected, (x @ weight.t(), grad @ weight, grad.t() @ x), strict=True):
        assert one.dtype == dtype
        # a tensor core lines 32 products up to the largest of them and cuts each 13 bits below it
        tolerance = 2.0**-8 * size + torch.finfo(dtype).eps * wide.abs()
        assert bool(((one.cpu().double() - wide).abs() <= tolerance).all())


@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_a_compiled_region_computes_what_eager_does(tmp_path: Path, scaling: str) -> None:
    torch.manual_seed(0)
    layer = BackendLinear(512, 768, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.set_backend(load("fp8", scaling=scaling, fast_accumulation="none"))
    inputs = {"x": torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16)}
    step, grad = compiled_step(layer.train(), inputs, tmp_path)
    results = step(grad)
    x = inputs["x"].requires_grad_()
    y = layer(x)
    y.backward(grad)
    pairs = {"output": y, "grad_x": x.grad, "grad_weight": layer.weight.grad}
    for name, expected in pairs.items():
        error = (results[name].double() - expected.double()).norm() / expected.double().norm()
        assert error < 2e-3, (name, float(error))


def test_a_weight_does_not_leave_the_forward_and_operands_are_stored_in_8_bits(tmp_path: Path) -> None:
    """Memory beyond inputs and results: x and its gradient rounded and turned, the weight rounded or turned."""
    tokens, inputs, outputs = 8192, 2048, 4096
    layer = BackendLinear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16)
    layer.set_backend(load("fp8"))
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    step, grad = compiled_step(layer.train(), {"x": x}, tmp_path)
    step(grad)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = step(grad)
    torch.cuda.synchronize()
    kept = sum(tensor.nbytes for name, tensor in results.items() if name != "grad_output")
    rounded = 2 * tokens * (inputs + outputs) + 2 * inputs * outputs
    assert torch.cuda.max_memory_allocated() - before < kept + rounded + 2**23
