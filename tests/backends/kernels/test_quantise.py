import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.kernels.dither import indices, key_of, uniform
from backends.kernels.quantise import Range, quantise, split_ranges, wide_dtype


def bounds(low: float, high: float) -> Range:
    return Range(torch.tensor(low), torch.tensor(high))


def exact_levels(low: float, high: float, levels: int, lut_min: float | None) -> torch.Tensor:
    """All values Q can give, in float64, written from the definition."""
    values = torch.arange(levels, dtype=torch.float64) * (high - low) / (levels - 1) + low
    if lut_min is not None:
        zero = values.abs() < 1e-6 * max(abs(low), abs(high))
        values = torch.where(zero, 0.0, values)
        values = torch.where((values > 0) & (values < lut_min * high), lut_min * high, values)
        values = torch.where((values < 0) & (values > -lut_min * abs(low)), -lut_min * abs(low), values)
    return values


@given(
    levels=st.integers(2, 1024),
    low=st.floats(-100, 99, width=32),
    width=st.floats(2.0**-8, 100, width=32),
    lut_min=st.sampled_from([None, 0.0, 0.020040, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_every_element_is_the_nearest_level_lifted(levels, low, width, lut_min, dtype, seed):
    span = bounds(low, low + width)
    low, high = float(span.low), float(span.high)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(7, 11, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * (high - low) + low
    x = x.to(dtype)
    got = quantise(x, span, levels, lut_min).double()
    step, size = (high - low) / (levels - 1), max(abs(low), abs(high))
    rounding = 8 * torch.finfo(dtype).eps * size + 1e-8
    nearest = (got.unsqueeze(-1) - exact_levels(low, high, levels, lut_min)).abs().amin(-1)
    assert nearest.max() <= rounding, "not a level"
    lift = 0.0 if lut_min is None else lut_min * size
    # lifting moves a value by at most ℓ · |end|; 1e-8 in the divisor moves codes by (L − 1) · 1e-8 / width
    allowed = step * (0.5 + (levels - 1) * 1e-8 / (high - low)) + lift + rounding * levels
    assert (got - x.double().clamp(low, high)).abs().max() <= allowed


def test_levels_and_their_halves_as_computed_by_hand():
    x = torch.tensor([-2.0, -1.0, -0.6, -0.4, 0.0, 0.2, 0.9, 1.0, 3.0])
    got = quantise(x, bounds(-1.0, 1.0), 5)
    torch.testing.assert_close(got, torch.tensor([-1.0, -1.0, -0.5, -0.5, 0.0, 0.0, 1.0, 1.0, 1.0]))


def test_the_smallest_magnitude_lifts_what_is_below_it_and_leaves_zero():
    levels = torch.linspace(-1, 1, 101)
    got = quantise(levels, bounds(-1.0, 1.0), 101, 0.05)
    expected = torch.where(levels.abs() < 0.05 - 1e-6, levels.sign() * 0.05, levels)
    expected[50] = 0.0
    torch.testing.assert_close(got, expected)


def test_each_side_is_lifted_relative_to_its_own_end():
    got = quantise(torch.tensor([-0.01, 0.01]), bounds(-2.0, 1.0), 3001, 0.1)
    torch.testing.assert_close(got, torch.tensor([-0.2, 0.1]))


def test_zero_padding_is_not_lifted_where_zero_is_a_level():
    assert torch.equal(quantise(torch.zeros(5), bounds(-3.3, 3.3), 255, 0.02), torch.zeros(5))


def test_one_value_only_is_itself():
    torch.testing.assert_close(quantise(torch.full((3,), 0.7), bounds(0.7, 0.7), 256, 0.02), torch.full((3,), 0.7))


@pytest.mark.parametrize(("low", "high"), [(math.inf, -math.inf), (-1.0, -math.inf), (math.inf, 1.0)])
def test_an_unknown_range_lets_everything_through(low, high):
    x = torch.tensor([-5.0, 0.001, math.inf])
    assert torch.equal(quantise(x, bounds(low, high), 4, 0.02), x)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_comes_out_as_nan(broken):
    got = quantise(torch.tensor([0.5, broken]), bounds(-1.0, 1.0), 256, 0.02, torch.zeros(2))
    assert got[0].isfinite()
    assert got[1].isnan()


@pytest.mark.parametrize("levels", [2, 3, 16, 256, 1024])
def test_random_rounding_is_unbiased_and_within_one_level(levels):
    step = 2.0 / (levels - 1)
    count = 2**14
    for number, value in enumerate((-0.99, -0.3141, 0.0007, 0.5, 0.9876)):
        index = indices((count,), torch.tensor(number), count)
        dither = uniform(index, key_of(0, 0, torch.tensor(levels)), torch.float32)
        got = quantise(torch.full((count,), value), bounds(-1.0, 1.0), levels, dither=dither).double()
        part = (value + 1) / step % 1  # a coin with this chance of the level above
        deviation = step * math.sqrt(part * (1 - part) / count)
        assert abs(got.mean() - value) < 4 * deviation + 1e-6
        assert (got - value).abs().max() < step * (1 + 1e-4)


def test_random_rounding_never_leaves_the_range():
    top = torch.tensor([0.5 - 2.0**-25, -0.5 + 2.0**-25])
    got = quantise(torch.tensor([1.0, -1.0]), bounds(-1.0, 1.0), 256, dither=top)
    assert torch.equal(got, torch.tensor([1.0, -1.0]))


def test_size_is_the_larger_end_and_one_while_unknown():
    assert bounds(-3.0, 2.0).size() == 3
    assert bounds(math.inf, -math.inf).size() == 1
    assert bounds(0.0, 0.0).size() == 1


def test_ranges_are_split_in_pairs():
    first, second = split_ranges(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (first.low, first.high, second.low, second.high) == (1, 2, 3, 4)


def test_wide_dtypes():
    wide = {dtype: wide_dtype(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
    assert list(wide.values()) == [torch.float32, torch.float32, torch.float32, torch.float64]
