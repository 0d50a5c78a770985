"""The converters of an optical processor: levels within a range, and the smallest magnitude a modulator can show.

Q(x; L, m, M) = rint((clamp(x, m, M) − m) / (M − m + 1e-8) · (L − 1) + ξ) / (L − 1) · (M − m) + m, of the quantiser in
*Optical Transformers* (arXiv 2302.10360); ξ = 0 for operands, a random number in (−½, ½) an element for results. With
ξ = 0 the error is at most half a level, (M − m) / (L − 1) / 2; with ξ less than one level, and 0 on average.

Two things that a range cannot tell apart from numbers are kept apart here. A range that is not known yet (an infinite
end) lets its tensor through as it is. NaN and infinities come out as NaN instead of as an end of the range, so that
a run that has gone wrong shows it in its loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST_WIDTH = 1e-8


class Range(NamedTuple):
    """Where a tensor's values are expected: 0-d float32 tensors, infinite while not known."""

    low: Tensor
    high: Tensor

    def known(self) -> Tensor:
        """Bool, 0-d: whether both ends are numbers."""
        return torch.isfinite(self.low) & torch.isfinite(self.high)

    def size(self) -> Tensor:
        """The larger magnitude of the two ends; 1 while unknown, or where both are 0."""
        size = torch.maximum(self.low.abs(), self.high.abs())
        return torch.where(torch.isfinite(size) & (size > 0), size, 1.0)


def split_ranges(ends: Tensor) -> list[Range]:
    """[2 · n] (min, max, min, max, …) → n ranges."""
    return [Range(low, high) for low, high in zip(ends[::2].unbind(), ends[1::2].unbind(), strict=True)]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is computed in for tensors of `dtype`: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def quantise(
    x: Tensor, bounds: Range, levels: int, lut_min: float | None = None, dither: Tensor | None = None
) -> Tensor:
    """Q(x) in the dtype of x (float32 or float64); then, with `lut_min`, no magnitude below that part of the range.

    `dither` is ξ, of the shape of x. `lut_min` ℓ lifts 0 < x̂ < ℓM to ℓM and −ℓ|m| < x̂ < 0 to −ℓ|m|; x̂ = 0 stays.
    """
    low, high = bounds.low.to(x.dtype), bounds.high.to(x.dtype)
    position = (torch.clamp(x, low, high) - low) * ((levels - 1) / (high - low + SMALLEST_WIDTH))
    if dither is not None:
        # u + ξ may round up to a half beyond the last level
        code = torch.round(position + dither).clamp(0, levels - 1)
    else:
        code = torch.round(position)
    value = code * ((high - low) / (levels - 1)) + low
    if lut_min is not None:
        value = _lift(value, low, high, lut_min)
    value = torch.where(x.abs() < torch.inf, value, torch.nan)
    return torch.where(bounds.known(), value, x)


def _lift(value: Tensor, low: Tensor, high: Tensor, lut_min: float) -> Tensor:
    # A level that is 0 on paper comes out of code · step + m as a rounding error; it is not to be lifted.
    nothing = 4 * torch.finfo(value.dtype).eps * torch.maximum(low.abs(), high.abs())
    top, bottom = lut_min * high, -lut_min * low.abs()
    value = torch.where((value > nothing) & (value < top), top, value)
    return torch.where((value < -nothing) & (value > bottom), bottom, value)
