"""The stateless shuffle: a permutation, a different one per key, and no favourite places."""

import math
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from apps.training.data.order import shuffled


@given(length=st.integers(1, 3000), seed=st.integers(0, 2**63), epoch=st.integers(0, 10))
def test_every_element_comes_exactly_once(length, seed, epoch):
    assert sorted(shuffled(np.arange(length), length, seed, epoch)) == list(range(length))


@given(length=st.integers(1, 10**12), data=st.data())
def test_an_element_depends_on_its_position_alone(length, data):
    positions = np.array(data.draw(st.lists(st.integers(0, length - 1), max_size=20)), dtype=np.int64)
    together = shuffled(positions, length, 7)
    alone = [int(shuffled(np.array([p]), length, 7)[0]) for p in positions]
    assert together.tolist() == alone
    assert all(0 <= value < length for value in alone)


def test_the_order_never_changes_between_versions():
    """Resuming an old run must find the same rows: these numbers are part of the format."""
    assert shuffled(np.arange(10), 10, 42, 0).tolist() == [7, 1, 2, 8, 6, 9, 4, 0, 5, 3]


def test_all_permutations_of_few_rows_are_about_equally_likely():
    epochs = 4_800
    seen = Counter(tuple(shuffled(np.arange(4), 4, 1, epoch)) for epoch in range(epochs))
    expected = epochs / math.factorial(4)
    chi_squared = sum((count - expected) ** 2 / expected for count in seen.values())
    assert len(seen) == 24
    assert chi_squared < 49.7  # 99.9 % point of chi² with 23 degrees of freedom


def test_neighbours_do_not_stay_neighbours():
    length = 100_000
    order = shuffled(np.arange(length), length, 3)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(length))[0, 1]) < 0.02
    assert abs(np.mean(np.diff(order) == 1)) < 1e-3
