"""A shuffled order that needs no memory and no state.

Element i of the order is computed from (key, i) alone, so a run resumes in the middle of an epoch at no cost, every
worker finds its rows without a message, and a dataset of a billion rows needs no index of a billion numbers. NumPy's
own shuffles promise no stability between its versions; this one is plain integer arithmetic.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 8
_SMALLEST_HALF = 2  # bits; fewer leave too few distinct permutations for tiny datasets
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def shuffled(positions: np.ndarray, length: int, *key: int) -> np.ndarray:
    """Return the elements at `positions` of the pseudo-random permutation of range(length) that `key` names.

    positions: integers in [0, length), any shape; the result has that shape, dtype int64.

    A Feistel network permutes [0, 2^b) with 2^b ≥ length; a result outside the range is permuted again until it falls
    inside ("cycle walking", Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 4).
    """
    half = max(_SMALLEST_HALF, (max(1, length - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    values = np.asarray(positions).astype(np.uint64)
    flat = _permute(values.ravel(), half, keys)
    outside = np.flatnonzero(flat >= length)
    while outside.size:
        flat[outside] = _permute(flat[outside], half, keys)
        outside = outside[flat[outside] >= length]
    return flat.reshape(values.shape).astype(np.int64)


def _permute(values: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the Feistel network over numbers of 2·half bits."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for round_key in keys:
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    state = np.zeros(1, dtype=np.uint64)
    for number in key:
        state = _mix(state + _GOLDEN + np.uint64(number % 2**64))
    return _mix(state + _GOLDEN * np.arange(1, _ROUNDS + 1, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit sways every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
