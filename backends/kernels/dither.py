"""Random numbers from a counter: the same bits on every device, for whichever way a batch is dealt to workers.

A number is a hash of (seed, stream, step) and of the element's index within the step's global batch. Nothing is drawn
in order, so recomputing an activation, resuming a run or computing rows elsewhere gives the same numbers. The hash is
two multiply-xorshift rounds of 32 bits (constants of C. Wellons' `lowbias32`) with a key injected before each, so two
keys give two unrelated sequences and not two shifts of one. All arithmetic is that of int32 and wraps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FIRST_MULTIPLIER = 0x7FEB352D
SECOND_MULTIPLIER = 0x846CA68B - 2**32  # as a signed 32-bit number
GRID = 2.0**-24


class Key(NamedTuple):
    """Two int32 words, 0-d (or of a shape that broadcasts with the indices), that name a sequence."""

    first: Tensor
    second: Tensor


def key_of(seed: int, stream: int, step: Tensor) -> Key:
    """The key of a sequence: `step` int64 0-d, all 64 bits of it; `stream` tells apart the uses within one step."""
    one, other = words_of(seed, stream)
    first = _mix(_to_int32(step) ^ signed(one), _to_int32(step >> 32))
    return Key(first, _mix(first ^ signed(other), 0))


def words_of(seed: int, stream: int) -> tuple[int, int]:
    """What a key has of the numbers known when tracing: two words of 32 bits."""
    return python_hash(seed, 2 * stream), python_hash(seed, 2 * stream + 1)


def keyed(key: Key, number: Tensor) -> Key:
    """A key for each `number` (int64, any shape, all 64 bits), unrelated to `key` and to those of other numbers."""
    first = _mix(_to_int32(number) ^ key.first, _to_int32(number >> 32) ^ key.second)
    return Key(first, _mix(first ^ key.second, 0))


def indices(shape: tuple[int, ...], first_row: Tensor, elements_per_row: int) -> Tensor:
    """first_row · elements_per_row + flat index, modulo 2³² as int32, in `shape`.

    `first_row` int64 0-d is the index, in the step's global batch, of the first of the rows at hand.
    """
    base = _to_int32(first_row * elements_per_row)
    count = math.prod(shape)
    if count < 2**31:
        return (torch.arange(count, dtype=torch.int32, device=first_row.device) + base).view(shape)
    # In two parts, each of which fits int32; the flat form above fuses with a sum or an extreme over all elements.
    column = torch.arange(shape[-1], dtype=torch.int32, device=first_row.device)
    row = torch.arange(count // shape[-1], dtype=torch.int32, device=first_row.device) * signed(shape[-1])
    return ((row + base)[:, None] + column).view(shape)


def random_bits(index: Tensor, key: Key) -> Tensor:
    """32 random bits (int32) for each int32 index."""
    return _mix(index ^ key.first, key.second)


def uniform(index: Tensor, key: Key, dtype: torch.dtype) -> Tensor:
    """ξ in (−½, ½), symmetric, on the grid (i + ½) 2⁻²⁴: every value is exact in float32."""
    return ((random_bits(index, key) >> 8).to(dtype) + 0.5) * GRID


def normal(index: Tensor, key: Key, other: Key, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers by Box and Muller from two sequences; magnitudes end at 5.9."""
    radius = torch.sqrt(-2.0 * torch.log(uniform(index, key, dtype) + 0.5))
    return radius * torch.cos(2.0 * math.pi * uniform(index, other, dtype))


def signed(word: int) -> int:
    """The int32 with the same low 32 bits."""
    return ((word + 2**31) % 2**32) - 2**31


def python_hash(seed: int, stream: int) -> int:
    """A 32-bit word for numbers known when tracing: seed modulo 2⁶⁴, a small stream number."""
    word = 0
    for part in (seed % 2**32, seed // 2**32 % 2**32, stream):
        word = (word ^ part) + 0x9E3779B9 & 0xFFFFFFFF
        word = (word ^ word >> 16) * FIRST_MULTIPLIER & 0xFFFFFFFF
        word = (word ^ word >> 15) * (SECOND_MULTIPLIER % 2**32) & 0xFFFFFFFF
        word ^= word >> 16
    return word


def _mix(word: Tensor, second: Tensor | int) -> Tensor:
    # `>>` of int32 copies the sign; the mask makes it a shift of unsigned bits.
    word = (word ^ (word >> 16 & 0xFFFF)) * FIRST_MULTIPLIER
    word = word ^ second
    word = (word ^ (word >> 15 & 0x1FFFF)) * SECOND_MULTIPLIER
    return word ^ (word >> 16 & 0xFFFF)


def _to_int32(word: Tensor) -> Tensor:
    """The low 32 bits of an int64, as int32, without relying on what a narrowing cast does."""
    return (((word + 2**31) & 0xFFFFFFFF) - 2**31).to(torch.int32)
