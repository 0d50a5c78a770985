"""A float32 master kept as its bfloat16 weight and the 16 bits that the weight lacks.

The weight is the master rounded to the nearest bfloat16, ties away from zero. What is then left of the master's bits,
taken as integers, lies in −2¹⁵ … 2¹⁵ − 1, so that weight and rest together are the master to the last bit, in 4 bytes
where both take 6. A master that is not a number stays one, its other bits are lost.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

HALF = 1 << 15
REST = "rest"  # as which the rest belongs to a parameter's optimizer state


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [...] → bfloat16 weight and int16 rest of the same shape."""
    bits = master.view(torch.int32)
    high = (bits + HALF) >> 16
    low = bits - (high << 16)
    nothing = torch.isnan(master)  # adding to its bits could make a number of it
    weight = torch.where(nothing, torch.nan, (high << 16).view(torch.float32)).to(torch.bfloat16)
    return weight, torch.where(nothing, 0, low).to(torch.int16)


def join(weight: Tensor, rest: Tensor) -> Tensor:
    """The float32 master of a bfloat16 weight and its int16 rest."""
    bits = weight.to(torch.float32).view(torch.int32) + rest.to(torch.int32)
    return bits.view(torch.float32)


class Joined(Mapping[str, Tensor]):
    """Masters by name, joined whenever one is asked for."""

    def __init__(self, weights: Mapping[str, Tensor], rests: Mapping[str, Tensor]) -> None:
        self._weights, self._rests = weights, rests

    def __getitem__(self, name: str) -> Tensor:
        return join(self._weights[name], self._rests[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._rests)

    def __len__(self) -> int:
        return len(self._rests)
