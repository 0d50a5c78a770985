"""Rounding to bfloat16 that is right on average: up or down, with the probability that leaves the mean as it is.

An update far below bfloat16's spacing then still moves a weight, once in so many steps. Whether a number goes up is
decided by a hash of (seed, step, parameter) and the element's index: the same on every device, in whichever worker or
shard holds the tensor, and after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backends.kernels.dither import Key, python_hash, random_bits, signed

COLUMNS = 4  # numbers that carry a key: two words of 32 bits as a signed and an unsigned half each


def key_columns(seed: int, step: int, parameter: int) -> list[float]:
    """The key of a parameter's rounding at a step, as numbers that float32 holds exactly."""
    columns = []
    for stream in (0, 1):
        word = signed(python_hash(python_hash(seed, stream) << 32 | step % 2**32, parameter))
        columns += [float(word >> 16), float(word & 0xFFFF)]
    return columns


def key_of(columns: Tensor) -> Key:
    """The key in the numbers [`COLUMNS`] of `key_columns`."""
    halves = columns.to(torch.int32)
    return Key(halves[0] * 2**16 + halves[1], halves[2] * 2**16 + halves[3])


def round_to_bfloat16(values: Tensor, key: Key) -> Tensor:
    """float32 [...] → bfloat16 [...], up or down at random without bias; what is not finite stays as it is.

    The low 16 bits are what bfloat16 lacks: with uniform random bits added they carry into the others as often as they
    are large. Sign and magnitude being apart, that is away from zero for both signs.
    """
    index = torch.arange(values.numel(), dtype=torch.int32, device=values.device).view(values.shape)
    bits = values.view(torch.int32) + (random_bits(index, key) & 0xFFFF)
    rounded = (bits & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)
