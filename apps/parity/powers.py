"""How far one tensor is from another: powers, summed on the device, and what they say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """Σ reference² and Σ (other − reference)² over all elements of all batches."""

    reference_power: float
    error_power: float

    @property
    def relative(self) -> float:
        """‖other − reference‖ / ‖reference‖; 0 when both agree on zeros, infinite when only the reference is 0."""
        if self.reference_power == 0.0:
            return 0.0 if self.error_power == 0.0 else math.inf if self.error_power > 0 else math.nan
        return math.sqrt(self.error_power / self.reference_power)

    @property
    def snr_db(self) -> float:
        """10 log10 (reference power / error power): 6 dB for each bit; infinite for equal tensors."""
        relative = self.relative
        return math.inf if relative == 0.0 else -20.0 * math.log10(relative) if relative > 0 else math.nan


class ErrorSum:
    """Adds up an Error over batches without a wait for the device."""

    def __init__(self) -> None:
        self._powers: list[Tensor] = []

    def add(self, reference: Sequence[Tensor], other: Sequence[Tensor]) -> None:
        """Count the tensors of `other` against those of `reference`, shape by shape the same."""
        for expected, found in zip(reference, other, strict=True):
            wide = torch.promote_types(expected.dtype, torch.float32)
            difference = found.to(wide) - expected.to(wide)
            self._powers.append(torch.stack([_power(expected), _power(difference)]))

    def error(self) -> Error | None:
        """The sum so far; None when nothing was added."""
        if not self._powers:
            return None
        return Error(*torch.stack(self._powers).sum(0).tolist())


class LocalErrors(NamedTuple):
    """A layer fed with what the reference fed its own. None: the gradient does not exist in both."""

    output: Error
    input_gradient: Error | None
    weight_gradient: Error | None


def _power(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float64)).square()
