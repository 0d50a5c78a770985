from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from backends.kernels import fp8
from backends.kernels.fp8 import E4M3, E5M2
from backends.kernels.fp8_linear import Recipe, _Fp8Linear, fp8_linear
from tests.backends.kernels import fp8_reference as reference
from tests.backends.kernels.test_fp8 import of_gpu, random_rows

RECIPE = Recipe(grad_dtype=E5M2, by_row=True, fp8_grad_weight=True, fast_forward=True, fast_backward=False)


def computed(x: Tensor, weight: Tensor, grad: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Y, dX, dW."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = fp8_linear(x, weight, recipe)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad)


def operands(seed: int, tokens: int, inputs: int, outputs: int, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, gradient in float64 with rows of very different sizes."""
    x = random_rows(seed, tokens, inputs, -spread, spread)
    return x, random_rows(seed + 1, outputs, inputs, -8, -3), random_rows(seed + 2, tokens, outputs, -30, spread - 30)


SHAPES = {"tokens": st.integers(1, 40), "inputs": st.integers(1, 40), "outputs": st.integers(1, 40)}


@given(
    seed=st.integers(0, 10**6), **SHAPES, spread=st.integers(0, 12), by_row=st.booleans(),
    grad_format=st.sampled_from(["e5m2", "e4m3"]),
)  # fmt: skip
def test_float64_products_are_those_of_numbers_rounded_by_the_formats_definition(
    seed, tokens, inputs, outputs, spread, by_row, grad_format
):
    number, recipe = reference.FORMATS[grad_format], RECIPE._replace(by_row=by_row)
    recipe = recipe._replace(grad_dtype=E5M2 if grad_format == "e5m2" else E4M3)
    x, weight, grad = operands(seed, tokens, inputs, outputs, spread)
    found = computed(x, weight, grad, recipe)
    exact = reference.linear(x, weight, by_row), *reference.gradients(x, weight, grad, by_row, number)
    plain = x @ weight.t(), grad @ weight, grad.t() @ x
    sizes = x.abs() @ weight.abs().t(), grad.abs() @ weight.abs(), grad.abs().t() @ x.abs()
    bounds = reference.bounds(x, weight, grad, by_row, number)
    for one, expected, of_plain, size, bound in zip(found, exact, plain, sizes, bounds, strict=True):
        assert bool(((one - expected).abs() <= 1e-13 * size).all())
        assert bool(((one - of_plain).abs() <= bound + 1e-13 * size).all())


@given(
    seed=st.integers(0, 10**6), **SHAPES, by_row=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_narrower_products_differ_by_the_rounding_of_sums(seed, tokens, inputs, outputs, by_row, dtype):
    x, weight, grad = (one.to(dtype) for one in operands(seed, tokens, inputs, outputs, 3))
    recipe = RECIPE._replace(by_row=by_row)
    found = computed(x, weight, grad, recipe)
    wide = [one.double() for one in (x, weight, grad)]
    exact = computed(*wide, recipe)
    x, weight, grad = (2 * one.abs() for one in wide)  # more than any number is rounded up
    sizes = x @ weight.t(), grad @ weight, grad.t() @ x
    for one, expected, size in zip(found, exact, sizes, strict=True):
        assert one.dtype == dtype
        tolerance = 40 * 2.0**-24 * size + torch.finfo(dtype).eps * expected.abs()
        assert bool(((one.double() - expected).abs() <= tolerance).all())


def test_a_weight_gradient_in_the_compute_dtype_is_the_plain_one():
    x, weight, grad = operands(3, 20, 24, 28, 3)
    _, grad_x, grad_weight = computed(x, weight, grad, RECIPE._replace(fp8_grad_weight=False))
    torch.testing.assert_close(grad_weight, grad.t() @ x, rtol=1e-13, atol=0.0)
    assert torch.equal(grad_x, computed(x, weight, grad, RECIPE)[1])


def test_leading_dimensions_are_rows():
    x, weight, grad = operands(4, 24, 16, 32, 3)
    flat = computed(x, weight, grad, RECIPE)
    y, grad_x, grad_weight = computed(x.view(2, 3, 4, 16), weight, grad.view(2, 3, 4, 32), RECIPE)
    assert y.shape == (2, 3, 4, 32)
    assert torch.equal(y.view(24, 32), flat[0])
    assert torch.equal(grad_x, flat[1].view(2, 3, 4, 16))
    assert torch.equal(grad_weight, flat[2])


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_gradients_that_are_asked_for_are_computed(needed, monkeypatch):
    x, weight, grad = operands(5, 16, 16, 16, 3)
    expected = computed(x, weight, grad, RECIPE)[1:]
    products = []
    monkeypatch.setattr(
        "backends.kernels.fp8_linear.multiply", lambda *a, **k: products.append(1) or fp8.multiply(*a, **k)
    )
    leaves = [one.detach().requires_grad_(wants) for one, wants in zip((x, weight), needed, strict=True)]
    fp8_linear(*leaves, RECIPE).backward(grad)
    assert len(products) == 2
    for leaf, gradient, wants in zip(leaves, expected, needed, strict=True):
        assert torch.equal(leaf.grad, gradient) if wants else leaf.grad is None


# ---- what it means for batches that are split --------------------------------------------------------------------


def parts_summed(x: Tensor, weight: Tensor, grad: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Y, dX, dW of two workers (or microbatches) with half of the rows each, dW summed."""
    half = len(x) // 2
    y, grad_x, grad_weight = zip(
        computed(x[:half], weight, grad[:half], recipe), computed(x[half:], weight, grad[half:], recipe), strict=True
    )
    return torch.cat(y), torch.cat(grad_x), grad_weight[0] + grad_weight[1]


@pytest.mark.parametrize("by_row", [True, False])
def test_split_rows_give_the_same_numbers_where_none_falls_below_the_normal_range(by_row):
    """Also with one scale: powers of two do not change a rounding."""
    recipe = RECIPE._replace(by_row=by_row)
    x, weight, grad = operands(6, 32, 48, 16, 0)
    x[:16] *= 4.0  # the halves have scales of their own
    grad[16:] *= 16.0
    x, grad = (torch.where(one.abs() < one.abs().amax() / 2**10, one.abs().amax() / 16, one) for one in (x, grad))
    for found, expected in zip(parts_summed(x, weight, grad, recipe), computed(x, weight, grad, recipe), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14 * float(expected.abs().max()))


def test_scales_of_rows_do_not_see_other_rows_and_one_scale_does():
    x, weight, grad = operands(7, 32, 48, 16, 3)
    x[:16] *= 2.0**12  # outliers in the first half
    for by_row in (True, False):
        recipe = RECIPE._replace(by_row=by_row)
        y, grad_x, grad_weight = parts_summed(x, weight, grad, recipe)
        whole = computed(x, weight, grad, recipe)
        assert torch.equal(y[16:], whole[0][16:]) == by_row
        if by_row:
            assert torch.equal(y, whole[0])
            assert torch.equal(grad_x, whole[1])
            torch.testing.assert_close(grad_weight, whole[2], rtol=1e-12, atol=1e-12 * float(whole[2].abs().max()))


# ---- numbers that are none, or nearly ----------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [True, False])
def test_rows_of_zeros_give_zeros_and_spoil_no_gradient(by_row):
    """A masked token's gradient is 0, whose scale must not drown the others'."""
    recipe = RECIPE._replace(by_row=by_row)
    x, weight, grad = operands(8, 20, 24, 28, 2)
    grad *= 2.0**-80
    x[3], grad[5] = 0.0, 0.0
    y, grad_x, grad_weight = computed(x, weight, grad, recipe)
    assert bool((y[3] == 0).all())
    assert bool((grad_x[5] == 0).all())
    kept = [t for t in range(20) if t not in (3, 5)]
    torch.testing.assert_close(
        grad_weight,
        computed(x[kept], weight, grad[kept], recipe)[2],
        rtol=1e-12,
        atol=1e-12 * float(grad_weight.abs().max()),
    )
    for zeros in (x * 0, weight, grad), (x, weight * 0, grad), (x, weight, grad * 0):
        assert all(bool(one.isfinite().all()) for one in computed(*zeros, recipe))


@pytest.mark.parametrize("power", [-30, 60])
def test_very_small_and_very_large_numbers_keep_their_precision(power):
    x, weight, grad = operands(9, 20, 24, 28, 0)
    expected = computed(x, weight, grad, RECIPE)
    sizes = (x * 2.0**power).float(), (weight * 2.0**-power).float(), (grad * 2.0**power).float()
    y, grad_x, grad_weight = computed(*sizes, RECIPE)
    torch.testing.assert_close(y.double(), expected[0], rtol=1e-5, atol=1e-5 * float(expected[0].abs().max()))
    torch.testing.assert_close(grad_x.double(), expected[1], rtol=1e-5, atol=1e-5 * float(expected[1].abs().max()))
    scaled = grad_weight.double() * 2.0 ** (-2 * power)
    torch.testing.assert_close(scaled, expected[2], rtol=1e-5, atol=1e-5 * float(expected[2].abs().max()))


def test_a_number_that_is_none_reaches_its_row_and_the_weights_gradient():
    x, weight, grad = operands(10, 8, 16, 16, 2)
    x[2, 5] = torch.inf
    y, grad_x, grad_weight = computed(x, weight, grad, RECIPE)
    assert bool(y[2].isnan().all())
    assert bool(y[[0, 1, 3]].isfinite().all())
    assert bool(grad_x.isfinite().all())
    assert bool(grad_weight.isnan().all())
    weight[1, 1] = torch.nan
    assert bool(computed(x[3:], weight, grad[3:], RECIPE)[1].isnan().all())  # dX takes the weight under one scale


# ---- the way of a GPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("shape", [(32, 48, 16), (17, 30, 9)])
def test_the_way_of_a_gpu_gives_what_the_twin_gives(monkeypatch, shape, by_row):
    recipe = RECIPE._replace(by_row=by_row)
    x, weight, grad = (one.float() for one in operands(11, *shape, 2))
    twin = computed(x, weight, grad, recipe)
    calls = of_gpu(monkeypatch)
    found = computed(x, weight, grad, recipe)
    assert [call["fast"] for call in calls] == [True, False, False]
    for one, expected in zip(found, twin, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 32, 48), (17, 30, 9), (1, 16, 16)])
@pytest.mark.parametrize("by_row", [True, False])
def test_products_have_the_layouts_and_extents_that_a_gpu_asks_for(monkeypatch, shape, dtype, by_row):
    """On fake CUDA tensors, whose rules of `_scaled_mm` are those of cuBLAS; autograd needs a real device."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tokens, inputs, outputs = shape
    with FakeTensorMode():
        x = torch.empty(tokens, inputs, dtype=dtype, device="cuda")
        weight = torch.empty(outputs, inputs, dtype=dtype, device="cuda")
        recipe = RECIPE._replace(by_row=by_row)
        y = _Fp8Linear.forward(x, weight, recipe)
        assert (y.shape, y.dtype, y.device.type) == ((tokens, outputs), dtype, "cuda")
        context = SimpleNamespace(saved_tensors=(x, weight), recipe=recipe, needs_input_grad=(True, True))
        grad_x, grad_weight, _ = _Fp8Linear.backward(context, torch.empty_like(y))
    assert (grad_x.shape, grad_x.dtype) == (x.shape, dtype)
    assert (grad_weight.shape, grad_weight.dtype) == (weight.shape, dtype)
