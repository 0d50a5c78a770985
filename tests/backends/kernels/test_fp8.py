import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from backends.kernels import fp8
from backends.kernels.fp8 import E4M3, E5M2, Scaled, aligned, multiply, power_of_two, scale_of, to_fp8
from tests.backends.kernels import fp8_reference as reference

FORMATS = [(E4M3, reference.E4M3), (E5M2, reference.E5M2)]


def random_rows(seed: int, rows: int, columns: int, low: int, high: int) -> Tensor:
    """Rows whose sizes lie between 2^low and 2^high."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * (high - low) + low
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 2.0**powers


@pytest.mark.parametrize(("dtype", "number"), FORMATS)
def test_the_constants_are_those_of_the_format(dtype, number):
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype).to(torch.float64)
    finite = codes[torch.isfinite(codes) & (codes >= 0)].unique()
    assert torch.equal(finite, number.numbers())
    assert fp8.LARGEST[dtype] == number.largest == 1.75 * 2.0 ** fp8.TOP_EXPONENT[dtype]
    assert fp8.SMALLEST[dtype] == number.step
    assert fp8.RELATIVE[dtype] == number.unit


@given(
    seed=st.integers(0, 10**6), rows=st.integers(1, 9), columns=st.integers(1, 33), by_row=st.booleans(),
    low=st.integers(-100, 90), spread=st.integers(0, 25), which=st.integers(0, 1),
)  # fmt: skip
def test_a_tensor_is_rounded_as_the_format_says_under_the_smallest_scale(
    seed, rows, columns, by_row, low, spread, which
):
    dtype, number = FORMATS[which]
    x = random_rows(seed, rows, columns, low, low + spread).to(torch.float32)
    values, exponent = to_fp8(x, dtype, by_row=by_row)
    expected = reference.exponents(x.double(), number, by_row)
    assert torch.equal(exponent.double(), expected)
    found = values.double() * 2.0 ** exponent.double()
    assert torch.equal(found, reference.rounded(x.double(), number, expected))
    assert bool(((found - x.double()).abs() <= reference.rounding_bound(x.double(), number, by_row)).all())


@pytest.mark.parametrize(("dtype", "number"), FORMATS)
@pytest.mark.parametrize("power", [-60, 0, 60])
def test_the_largest_number_keeps_the_smaller_scale_and_the_next_one_does_not(dtype, number, power):
    largest = number.largest * 2.0**power
    x = torch.tensor([[largest], [-largest], [math.nextafter(largest, 0)], [largest * (1 + 2.0**-23)]])
    values, exponent = to_fp8(x, dtype, by_row=True)
    assert exponent.flatten().tolist() == [power, power, power, power + 1]
    assert (values.double() * 2.0 ** exponent.double()).abs().flatten().tolist() == [largest] * 4


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_zeros_stay_zeros_and_scales_stay_numbers(dtype):
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3e38, -3e38], [1e-38, 0.0], [1e-45, 0.0]])
    exponent, factor = scale_of(x, dtype, by_row=True)
    assert bool(torch.isfinite(factor).all())
    assert bool((factor > 0).all())
    found = to_fp8(x, dtype, by_row=True).values.double() * 2.0 ** exponent.double()
    assert bool((found[x == 0] == 0).all())
    torch.testing.assert_close(found[1:4], x[1:4].double(), rtol=fp8.RELATIVE[dtype], atol=0.0)
    assert found[4, 0].abs() <= 2.0**-126 * fp8.SMALLEST[dtype]


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_makes_its_row_nan_or_with_one_scale_the_tensor(dtype, bad):
    x = torch.tensor([[1.0, bad, 2.0], [3.0, 4.0, 5.0]])
    by_row = to_fp8(x, dtype, by_row=True).values.float()
    assert bool(by_row[0].isnan().all())
    assert bool(by_row[1].isfinite().all())
    assert bool(to_fp8(x, dtype, by_row=False).values.float().isnan().all())


@given(seed=st.integers(0, 10**6), power=st.integers(-50, 50), by_row=st.booleans())
def test_a_power_of_two_changes_the_exponent_only(seed, power, by_row):
    x = random_rows(seed, 4, 8, -3, 3).to(torch.float32)
    values, exponent = to_fp8(x, E4M3, by_row=by_row)
    scaled_values, scaled_exponent = to_fp8(x * 2.0**power, E4M3, by_row=by_row)
    assert torch.equal(values.double(), scaled_values.double())
    assert torch.equal(exponent + power, scaled_exponent)


def test_power_of_two_has_every_power_of_float32_and_ends_at_both():
    exponent = torch.tensor([-400, -127, -126, -1, 0, 1, 127, 128, 400], dtype=torch.int32)
    expected = [0.0, 0.0, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127, 2.0**127, 2.0**127]
    assert power_of_two(exponent).tolist() == expected


@pytest.mark.parametrize("shape", [(16, 32), (1, 16), (17, 5), (48, 31)])
def test_extents_become_multiples_of_16_by_zeros(shape):
    x = torch.randn(shape)
    wide = aligned(x)
    assert wide.shape == (-(-shape[0] // 16) * 16, -(-shape[1] // 16) * 16)
    assert torch.equal(wide[: shape[0], : shape[1]], x)
    assert wide.count_nonzero() == x.numel()
    assert (wide is x) == (shape == (16, 32))


# ---- products ----------------------------------------------------------------------------------------------------


def of_gpu(monkeypatch: pytest.MonkeyPatch, *, scales_rows: bool = True) -> list[dict[str, object]]:
    """Take the way of a GPU, with a product that computes on a CPU and asks for what a GPU asks for."""
    calls = []

    def scaled_mm(a, b, scale_a, scale_b, *, out_dtype, use_fast_accum):
        assert a.is_contiguous()
        assert b.t().is_contiguous()
        assert a.shape[1] % 16 == b.shape[0] % 16 == b.shape[1] % 16 == 0
        assert a.dtype != E5M2 or b.dtype != E5M2  # cuBLAS has no product of two e5m2
        of_rows = scale_a.dim() == 2
        shapes = ((len(a), 1), (1, b.shape[1])) if of_rows else ((), ())
        assert (scale_a.shape, scale_b.shape) == shapes
        assert scale_a.is_contiguous()
        assert scale_b.is_contiguous()
        assert scale_a.dtype == scale_b.dtype == torch.float32
        calls.append({"out": out_dtype, "fast": use_fast_accum, "of_rows": of_rows})
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8, "has_fp8_products", lambda device: True)
    monkeypatch.setattr(fp8, "has_products_with_scales_of_rows", lambda device: scales_rows)
    return calls


@pytest.mark.parametrize("scales_rows", [True, False])
@pytest.mark.parametrize("by_row", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_multiplies_the_same_numbers_as_the_twin(monkeypatch, dtype, by_row, scales_rows):
    a = to_fp8(random_rows(1, 32, 48, -20, 4), E5M2, by_row=by_row[0])
    b = to_fp8(random_rows(2, 16, 48, -3, 3), E4M3, by_row=by_row[1])
    twin = multiply(a, b, dtype, fast=False)
    calls = of_gpu(monkeypatch, scales_rows=scales_rows)
    found = multiply(a, b, dtype, fast=True)
    out = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert calls == [{"out": out, "fast": True, "of_rows": scales_rows and any(by_row) and out == torch.bfloat16}]
    assert found.dtype == twin.dtype == dtype
    if dtype == torch.bfloat16:
        assert torch.equal(found, twin)  # a sum is rounded once, scaled or not
    else:
        torch.testing.assert_close(found, twin, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


def test_sums_beyond_float16_are_scaled_before_they_are_stored(monkeypatch):
    big = Scaled(torch.full((16, 64), 448.0).to(E4M3), torch.full((16, 1), -8, dtype=torch.int32))
    expected = torch.full((16, 16), 64 * (448.0 * 2.0**-8) ** 2, dtype=torch.float16)
    assert torch.equal(multiply(big, big, torch.float16, fast=False), expected)
    of_gpu(monkeypatch)
    assert torch.equal(multiply(big, big, torch.float16, fast=False), expected)


def test_a_cpu_has_no_fp8_products_and_a_gpu_that_is_not_there_has():
    assert not fp8.has_fp8_products(torch.device("cpu"))
    assert not fp8.has_fp8_products(torch.device("meta"))
    if not torch.cuda.is_available() and torch.version.hip is None:
        assert fp8.has_fp8_products(torch.device("cuda"))


@pytest.mark.parametrize(
    ("capability", "cuda", "products", "scales_rows"),
    [
        ((8, 0), "13.0", False, False),
        ((8, 9), "13.0", True, False),
        ((9, 0), "12.8", True, False),
        ((9, 0), "12.9", True, True),
        ((9, 0), "13.0", True, True),
        ((10, 0), "13.0", True, False),
    ],
)
def test_what_a_gpu_multiplies_depends_on_its_generation(monkeypatch, capability, cuda, products, scales_rows):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert fp8.has_fp8_products(torch.device("cuda")) is products
    assert fp8.has_products_with_scales_of_rows(torch.device("cuda")) is scales_rows
