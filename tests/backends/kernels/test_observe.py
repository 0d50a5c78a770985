import math

import pytest
import torch

from backends.kernels.dither import key_of
from backends.kernels.observe import SAMPLE_SIZE, extremes, follow, quantiles

KEY = key_of(0, 0, torch.tensor(0))


def test_extremes_are_those_of_all_elements_or_of_the_attended():
    x = torch.tensor([[5.0, -7.0], [1.0, 2.0]])
    assert extremes(x) == (-7, 5)
    assert extremes(x, torch.tensor([[False, False], [True, True]])) == (1, 2)
    assert extremes(x, torch.zeros(2, 2, dtype=torch.bool)) == (math.inf, -math.inf)


def test_ranges_of_bfloat16_are_float32_scalars():
    low, high = extremes(torch.randn(3, 4).bfloat16())
    assert (low.dtype, low.shape, high.dtype, high.shape) == (torch.float32, (), torch.float32, ())


@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.01, 0.99), (0.25, 0.5)])
@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_quantiles_of_few_elements_are_exact(levels, count):
    x = torch.randn(count)
    torch.testing.assert_close(torch.stack(quantiles(x, levels, KEY)), torch.quantile(x, torch.tensor(levels)))


def test_quantiles_of_the_attended_only():
    x, attended = torch.randn(20, 30), torch.rand(20, 30) < 0.3
    expected = torch.quantile(x[attended], torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(torch.stack(quantiles(x, (0.1, 0.9), KEY, attended)), expected)


@pytest.mark.parametrize("shape", [(2**18,), (512, 384), (64, 4096)])
@pytest.mark.parametrize("level", [0.5, 0.99, 0.999])
def test_sampled_quantiles_have_the_stated_standard_error(shape, level):
    """Over 100 keys, the part of x below the result scatters around the level as a binomial one does."""
    x = torch.randn(shape) * torch.linspace(0.1, 3, shape[-1])  # columns of different widths
    ordered = x.flatten().sort().values
    found = torch.stack([quantiles(x, (0.1, level), key_of(0, 0, torch.tensor(step))).high for step in range(100)])
    below = torch.searchsorted(ordered, found).double() / x.numel()
    error = math.sqrt(level * (1 - level) / SAMPLE_SIZE)
    assert abs(below.mean() - level) < 4 * error / 10
    assert 0.75 < below.std() / error < 1.25


def test_quantiles_have_no_limit_of_16_million_elements():
    x = torch.arange(17_000_000, dtype=torch.float32)
    low, high = quantiles(x, (0.01, 0.99), KEY)
    error = 4 * math.sqrt(0.01 * 0.99 / SAMPLE_SIZE)
    assert abs(low / x.numel() - 0.01) < error
    assert abs(high / x.numel() - 0.99) < error


def test_quantiles_of_nothing_and_of_nan_are_nan():
    assert all(end.isnan() for end in quantiles(torch.ones(3), (0.1, 0.9), KEY, torch.zeros(3, dtype=torch.bool)))
    assert all(end.isnan() for end in quantiles(torch.tensor([1.0, math.nan]), (0.1, 0.9), KEY))


def test_an_empty_tensor_has_no_range():
    x = torch.zeros(0, 7, dtype=torch.bfloat16)
    for attended in (None, torch.ones(1, 7, dtype=torch.bool)):
        assert extremes(x, attended) == (math.inf, -math.inf)
        assert all(end.isnan() for end in quantiles(x, (0.1, 0.9), KEY, attended))
    assert {(end.dtype, end.shape) for end in (*extremes(x), *quantiles(x, (0.1, 0.9), KEY))} == {(torch.float32, ())}


def test_a_range_follows_what_is_seen_as_a_plain_loop_says():
    seen = [4.0, 8.0, math.nan, -2.0, math.inf, 3.0]
    expected, end = None, torch.tensor(math.inf)
    for value in seen:
        if math.isfinite(value):
            expected = value if expected is None else 0.9 * expected + 0.1 * value
        end = follow(end, torch.tensor(value), 0.9)
        assert math.isclose(float(end), expected, rel_tol=1e-6)


def test_an_unknown_end_stays_unknown_while_nothing_is_seen():
    assert follow(torch.tensor(math.inf), torch.tensor(math.nan), 0.9) == math.inf
