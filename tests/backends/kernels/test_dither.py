import itertools
import math

import pytest
import torch

from backends.kernels.dither import indices, key_of, normal, python_hash, random_bits, signed, uniform

ELEMENTS = 2**16


def number(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def sequence(seed=0, stream=0, step=0, count=ELEMENTS):
    return uniform(indices((count,), number(0), 1), key_of(seed, stream, number(step)), torch.float32).double()


def chi_squared(values: torch.Tensor, bins: int = 64) -> float:
    """Normalised to mean 0 and deviation 1 for uniform values in (−½, ½)."""
    counts = torch.histc(values.float(), bins, -0.5, 0.5).double()
    expected = len(values) / bins
    return float((((counts - expected) ** 2 / expected).sum() - (bins - 1)) / math.sqrt(2 * (bins - 1)))


# ---- the same bits as written out in Python ----------------------------------------------------------------------


def mix_in_python(word: int, second: int) -> int:
    """The two rounds on unsigned numbers of any size."""
    word = (word ^ word >> 16) * 0x7FEB352D % 2**32
    word ^= second
    word = (word ^ word >> 15) * 0x846CA68B % 2**32
    return word ^ word >> 16


@pytest.mark.parametrize("step", [0, 1, 2**31, 2**32 + 5, 2**62 + 17])
def test_bits_equal_those_of_unsigned_arithmetic(step):
    key = key_of(3, 1, number(step))
    first = mix_in_python(step % 2**32 ^ python_hash(3, 2), step >> 32)
    second = mix_in_python(first ^ python_hash(3, 3), 0)
    assert (int(key.first) % 2**32, int(key.second) % 2**32) == (first, second)
    places = [0, 1, 77, 2**31 - 1, 2**31, 2**32 - 1]
    index = torch.tensor([signed(place) for place in places], dtype=torch.int32)
    expected = [mix_in_python(place ^ first, second) for place in places]
    assert [bits % 2**32 for bits in random_bits(index, key).tolist()] == expected


def test_values_lie_on_the_grid_inside_one_level():
    index = torch.tensor([signed(place) for place in range(0, 2**32, 2**16 + 1)], dtype=torch.int32)
    values = uniform(index, key_of(0, 0, number(0)), torch.float32).double()
    assert values.abs().max() < 0.5
    codes = values * 2**24 - 0.5
    assert torch.equal(codes, codes.round())


# ---- uniform and independent -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 1000])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_uniform_over_elements(seed, step):
    assert abs(chi_squared(sequence(seed, step=step))) < 4


def test_uniform_over_steps_and_over_seeds():
    over_steps = torch.stack([sequence(step=step, count=32) for step in range(2048)])
    over_seeds = torch.stack([sequence(seed=seed, count=32) for seed in range(2048)])
    for element in (0, 1, 31):
        assert abs(chi_squared(over_steps[:, element], 16)) < 4
        assert abs(chi_squared(over_seeds[:, element], 16)) < 4


def test_independent_of_neighbours_at_every_distance_that_a_layer_has():
    values = sequence()
    for distance in (1, 2, 3, 64, 128, 384, 1024, 1408, 4096):
        product = values[:-distance] * values[distance:] * 12  # variance of ξ is 1/12
        assert abs(product.mean()) * math.sqrt(len(product)) < 4


def test_pairs_of_neighbours_fill_the_square():
    values = sequence().view(-1, 2) + 0.5
    cells = (values * 8).floor().long()
    counts = torch.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64).double()
    expected = len(values) / 64
    assert abs(((counts - expected) ** 2 / expected).sum() - 63) / math.sqrt(2 * 63) < 4


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": 1}, {"step": 1}, {"step": 2**32}])
def test_sequences_of_other_seeds_streams_and_steps_are_independent_and_no_shifts(other):
    one, two = sequence(), sequence(**other)
    for shift in (0, 1, 2, 1024):
        product = one[shift:] * two[: len(two) - shift] * 12
        assert abs(product.mean()) * math.sqrt(len(product)) < 4
    assert len(set(one[:1000].tolist()) & set(two[:1000].tolist())) < 5


def test_each_bit_of_the_index_changes_half_of_the_bits():
    index, key = indices((4096,), number(0), 1), key_of(0, 0, number(0))
    for bit in range(31):
        changed = random_bits(index, key) ^ random_bits(index ^ (1 << bit), key)
        ones = sum(((changed >> place) & 1).double().mean() for place in range(32))
        assert 15.5 < ones < 16.5


# ---- places ------------------------------------------------------------------------------------------------------


def test_rows_have_the_same_numbers_however_they_are_dealt():
    key = key_of(0, 0, number(4))
    whole = uniform(indices((12, 5, 7), number(0), 35), key, torch.float32)
    for parts in ((12,), (6, 6), (1, 4, 7), (3, 3, 3, 3)):
        starts = [0, *itertools.accumulate(parts)][:-1]
        dealt = [indices((rows, 5, 7), number(start), 35) for rows, start in zip(parts, starts, strict=True)]
        assert torch.equal(torch.cat([uniform(index, key, torch.float32) for index in dealt]), whole)


def test_an_index_beyond_32_bits_wraps():
    index = indices((2, 3), number(2**30), 7)
    expected = [(2**30 * 7 + place) % 2**32 for place in range(6)]
    assert [place % 2**32 for place in index.flatten().tolist()] == expected


def test_more_elements_than_an_int32_counts_are_numbered_in_two_parts():
    shape = (2**20, 2**11)  # 2³¹ elements: on the meta device none of them exists
    assert indices(shape, torch.zeros((), dtype=torch.int64, device="meta"), 2**11).shape == shape


# ---- normal numbers ----------------------------------------------------------------------------------------------


def test_normal_numbers_have_the_moments_and_tails_of_a_normal_distribution():
    index = indices((2**18,), number(0), 1)
    values = normal(index, key_of(0, 1, number(0)), key_of(0, 2, number(0)), torch.float64)
    error = 1 / math.sqrt(len(values))
    assert abs(values.mean()) < 4 * error
    assert abs(values.var() - 1) < 4 * math.sqrt(2) * error
    assert abs((values**4).mean() - 3) < 4 * math.sqrt(96) * error
    for limit in (1.0, 2.0, 3.0):
        beyond = math.erfc(limit / math.sqrt(2))
        assert abs((values.abs() > limit).double().mean() - beyond) < 4 * math.sqrt(beyond) * error
    assert values.isfinite().all()
