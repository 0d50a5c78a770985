"""A master in two halves is the master, and its weight the nearest there is."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.split_masters import Joined, join, split

PATTERNS = st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50)


def master_of(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@given(PATTERNS)
def test_weight_and_rest_are_the_master_to_the_last_bit(bits: list[int]) -> None:
    master = master_of(bits)
    weight, rest = split(master)
    assert (weight.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    again, numbers = join(weight, rest), ~master.isnan()
    assert torch.equal(again[numbers].view(torch.int32), master[numbers].view(torch.int32))
    assert again[~numbers].isnan().all()


@given(PATTERNS)
def test_the_weight_is_the_nearest_bfloat16_and_ties_go_away_from_zero(bits: list[int]) -> None:
    master = master_of(bits)
    weight, _ = split(master)
    numbers = ~master.isnan()
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    nearest = master.to(torch.bfloat16)
    assert torch.equal(weight[numbers & ~tie], nearest[numbers & ~tie])
    tied = numbers & tie
    assert (weight[tied].double().abs() >= master[tied].double().abs()).all()
    assert weight[~numbers].isnan().all()


def test_what_the_rest_cannot_hold_is_no_number_either() -> None:
    """CUDA's NaN has all bits: with half a step added it would be −0."""
    master = master_of([0x7FFFFFFF, -1, 0x7F800000, -0x800000, 0x7F7FFFFF])
    weight, rest = split(master)
    assert weight.isnan().tolist() == [True, True, False, False, False]
    again = join(weight, rest)
    assert again.isnan().tolist() == [True, True, False, False, False]
    assert again[2:].tolist() == master[2:].tolist()


def test_masters_by_name_are_joined_when_they_are_asked_for() -> None:
    weights, rests = {"a": torch.ones(2, dtype=torch.bfloat16)}, {"a": torch.zeros(2, dtype=torch.int16)}
    masters = Joined(weights, rests)
    assert list(masters) == ["a"]
    assert len(masters) == 1
    rests["a"][1] = 3
    assert masters["a"].tolist() == [1.0, 1.0 + 3 * 2.0**-23]
