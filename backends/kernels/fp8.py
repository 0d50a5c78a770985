"""Tensors in 8-bit floating point (arXiv 2209.05433) under scales that are powers of two, found from the tensor.

A tensor x is kept as x8 · 2^e: x8 in one of two formats, e one number for each row or one for the tensor, the smallest
with which max |x| fits the format. Multiplying by a power of two rounds nothing, so x8 is off by the format's own
rounding only: by `RELATIVE` of a number at most, and below the normal range by half of 2^e · `SMALLEST`. It also makes
a number's rounding independent of e, until it falls below that range: what is scaled by row for one product can be
scaled anew for another, and a batch that is split keeps its numbers.

Exponents are integers, int32: nothing here depends on how a device divides or takes logarithms.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}  # both 7/4 of a power of two, 2^8 and 2^15
TOP_EXPONENT = {E4M3: 8, E5M2: 15}
SMALLEST = {E4M3: 2.0**-9, E5M2: 2.0**-16}  # the step between numbers below the normal range
RELATIVE = {E4M3: 2.0**-4, E5M2: 2.0**-3}  # half a unit of the last of 3 or 2 bits
MULTIPLE = 16  # of which every extent of an fp8 product has to be a multiple

_MANTISSA_BITS, _BIAS = 23, 127  # of float32
_BELOW_FOUR_SEVENTHS = 0.57142854  # the float32 before 4/7


class Scaled(NamedTuple):
    """values · 2^exponent: fp8 [rows, columns], and int32 [rows, 1] or, for one scale, [1, 1]."""

    values: Tensor
    exponent: Tensor

    def by_row(self) -> bool:
        """Whether each row has a scale of its own."""
        return self.exponent.numel() > 1


def scale_of(x: Tensor, dtype: torch.dtype, *, by_row: bool) -> tuple[Tensor, Tensor]:
    """(e, 2^-e) for x [rows, columns] of any floating dtype: int32 from -126 to 121, and float32; [rows, 1] or [1, 1].

    The second is NaN where x holds a NaN or an infinity, and so makes its row (or the tensor) NaN: a run that has gone
    wrong shows it in its loss. e4m3 has no infinity, and some devices make it the largest number.
    """
    amax = x.detach().abs().amax(1 if by_row else (0, 1), keepdim=True).to(torch.float32)
    # ⌈log₂(amax / largest)⌉ from the exponent bits of 4/7 amax; the largest number itself must not reach the next power
    bits = (amax * _BELOW_FOUR_SEVENTHS).view(torch.int32) >> _MANTISSA_BITS
    biased_inverse = (2 * _BIAS - 1 + TOP_EXPONENT[dtype] - bits).clamp_max(2 * _BIAS - 1)
    # Few steps, and no `where`: what takes many, Inductor stores as float32 before it is rounded, and NaN would be a
    # tensor, each a constant of its own, so that equal casts were different nodes of a graph.
    factor = (biased_inverse << _MANTISSA_BITS).view(torch.float32) + amax * 0.0
    return _BIAS - biased_inverse, factor


def to_fp8(x: Tensor, dtype: torch.dtype, *, by_row: bool) -> Scaled:
    """x [rows, columns], of any floating dtype, rounded to the nearest number of an fp8 `dtype`, ties to even."""
    exponent, factor = scale_of(x, dtype, by_row=by_row)
    return Scaled((x.to(torch.promote_types(x.dtype, torch.float32)) * factor).to(dtype), exponent)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, float32, from int32; 0 below 2⁻¹²⁶ and 2¹²⁷ above that."""
    return ((exponent + _BIAS).clamp(0, 2 * _BIAS) << _MANTISSA_BITS).view(torch.float32)


def aligned(x: Tensor) -> Tensor:
    """x [rows, columns] with zeros added until both extents are multiples of 16; x itself where they are."""
    rows, columns = x.shape
    return x if rows % MULTIPLE == columns % MULTIPLE == 0 else F.pad(x, (0, -columns % MULTIPLE, 0, -rows % MULTIPLE))


def multiply(a: Scaled, b: Scaled, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a bᵀ [M, N] in `dtype` for a [M, K], b [N, K], extents multiples of 16; summed in float32, float64 in itself.

    `fast`: a GPU may keep about 14 bits of a sum. Scales multiply the sums, in the product or behind it: powers of two,
    so that both give the same numbers.
    """
    if not has_fp8_products(a.values.device):
        wide = torch.float32 if dtype == torch.float16 else dtype  # every fp8 number is one of bfloat16
        y = a.values.to(wide) @ b.values.to(wide).t()
        return (y * power_of_two(a.exponent) * power_of_two(b.exponent).t()).to(dtype)
    # float16 could overflow before it is scaled
    out = dtype if dtype == torch.bfloat16 else torch.float32
    by_row = a.by_row() or b.by_row()
    if by_row and out == torch.bfloat16 and has_products_with_scales_of_rows(a.values.device):
        scales = [power_of_two(x.exponent).repeat(1 if x.by_row() else len(x.values), 1) for x in (a, b)]
        return _product(a, b, scales[0], scales[1].view(1, -1), out, fast)
    one = power_of_two(a.exponent.new_zeros(()))
    scales = [one if x.by_row() else power_of_two(x.exponent) for x in (a, b)]
    y = _product(a, b, scales[0].reshape(()), scales[1].reshape(()), out, fast)
    y = y * power_of_two(a.exponent) if a.by_row() else y
    y = y * power_of_two(b.exponent).t() if b.by_row() else y
    return y.to(dtype)


def _product(a: Scaled, b: Scaled, left: Tensor, right: Tensor, out: torch.dtype, fast: bool) -> Tensor:
    return torch._scaled_mm(a.values, b.values.t(), left, right, out_dtype=out, use_fast_accum=fast)


def has_fp8_products(device: torch.device) -> bool:
    """Whether products of fp8 tensors are an instruction there: NVIDIA from compute capability 8.9 on.

    A GPU that is not there (a trace on fake tensors) counts as a Hopper.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 9)


def has_products_with_scales_of_rows(device: torch.device) -> bool:
    """Whether cuBLAS scales rows and columns itself: on Hopper, from CUDA 12.9 on. Elsewhere PyTorch takes a kernel of
    its own, which is slow where sums keep all bits (pytorch/pytorch#147971)."""
    if not torch.cuda.is_available():
        return True
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)
