"""Stochastic rounding: neighbours only, right on average, and a function of seed, step, parameter and position."""

import pytest
import torch

from backends.precision import resolve
from backends.stochastic_rounding import COLUMNS, key_columns, key_of, round_to_bfloat16

COUNT = 2**18


def key(seed: int = 1, step: int = 1, parameter: int = 0, dtype: torch.dtype = torch.float32):
    return key_of(torch.tensor(key_columns(seed, step, parameter), dtype=dtype))


@pytest.mark.parametrize("value", [1.0 + 2**-10, -3.0 - 2**-8, 1e-30, -7.77e8, 0.1])
def test_the_mean_of_many_roundings_is_the_number(value: float) -> None:
    """Each goes to one of the two neighbours; the mean is within five standard errors of the number itself."""
    number = torch.tensor(value)
    rounded = round_to_bfloat16(number.expand(COUNT).contiguous(), key()).double()
    low, high = rounded.min(), rounded.max()
    assert low < number.double() < high
    assert len(rounded.unique()) == 2
    share = (number.double() - low) / (high - low)
    standard_error = (high - low) * (share * (1 - share) / COUNT).sqrt()
    assert (rounded.mean() - number.double()).abs() <= 5 * standard_error


def test_the_errors_of_many_numbers_add_up_to_nothing_and_rounding_to_the_nearest_does_not_move_them() -> None:
    """Eight hundred steps of an eighth of bfloat16's spacing: to the nearest they are lost, at random they arrive."""
    start, step = torch.full((512,), 1.0), 2.0**-10
    value, nearest = start.bfloat16(), start.bfloat16()
    for number in range(800):
        value = round_to_bfloat16(value.float() + step, key(step=number))
        nearest = (nearest.float() + step).bfloat16()
    expected = 1.0 + 800 * step
    assert torch.equal(nearest, start.bfloat16())
    assert (value.float().mean() - expected).abs() < 0.02
    assert value.float().std() > 0  # every element has luck of its own


def test_errors_of_neighbours_and_of_steps_are_independent() -> None:
    values = torch.full((COUNT,), 1.0 + 2**-8)  # half way between two
    up = [round_to_bfloat16(values, key(step=step)).double() > 1.0 for step in (1, 2)]
    up.append(round_to_bfloat16(values, key(parameter=1)).double() > 1.0)
    up.append(up[0].roll(1))
    for other in up[1:]:
        both = torch.stack([up[0].double(), other.double()]).corrcoef()[0, 1]
        assert both.abs() < 5 / COUNT**0.5


def test_what_bfloat16_holds_stays_and_so_does_what_is_not_finite() -> None:
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(round_to_bfloat16(exact.float(), key()), exact)
    odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    rounded = round_to_bfloat16(odd, key())
    assert rounded[:2].tolist() == [float("inf"), float("-inf")]
    assert rounded[2].isnan()
    assert rounded[3:].view(torch.int16).tolist() == odd[3:].bfloat16().view(torch.int16).tolist()


def test_the_key_travels_exactly_as_float32_and_names_seed_step_and_parameter() -> None:
    keys = {
        (seed, step, parameter): tuple(word.item() for word in key(seed, step, parameter))
        for seed in (0, 1, 2**40)
        for step in (1, 2, 10**6)
        for parameter in (0, 1, 500)
    }
    assert len(set(keys.values())) == len(keys)
    assert len(key_columns(1, 1, 1)) == COLUMNS
    for names, words in keys.items():
        assert words == tuple(word.item() for word in key(*names, dtype=torch.float64))
        assert all(-(2**31) <= word < 2**31 for word in words)


def test_it_is_a_policy_of_bfloat16_parameters_without_masters() -> None:
    policy = resolve("bfloat16", master="stochastic")
    assert (policy.master, policy.rounding) == ("none", "stochastic")
    assert "rounding stochastic" in policy.table()
    assert "rounding" not in resolve("bfloat16").table()
    with pytest.raises(ValueError, match=r"model\.dtype=bfloat16"):
        resolve("float32", master="stochastic")
