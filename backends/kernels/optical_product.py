"""One optical product in plain torch: operands through converters, light, detectors, and a converter back.

    x̂ = Q(x; x range), ŵ = LUT(Q(w; w range)), Y0 = x̂ ŵ, Y = Q(Y0; out range, ξ)

with ranges known *before* the step, so that one pass over each tensor both converts it and sees its range.

Shot noise (`photons_per_mac` = n). Signed numbers are encoded differentially: light of the positive and of the
negative products x̂ₖ ŵₖ falls on two detectors whose difference is Y0. The light of each dot product is assumed to be
set so that its two detectors together count N = n·K photons. Counts are Poisson, here Gaussian (good above some ten
photons), so Y0 gets a normal error of standard deviation Σₖ |x̂ₖ ŵₖ| / √N: a signal-to-noise ratio of √N where all
products have one sign (*Optical Transformers*, arXiv 2302.10360), and less where they cancel. The magnitudes cost a
second product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from backends.kernels.dither import Key, indices, key_of, normal, uniform, words_of
from backends.kernels.observe import extremes, quantiles
from backends.kernels.quantise import Range, quantise


class Converters(NamedTuple):
    """What does not change between steps: numbers that are compiled into a region."""

    input_levels: int
    output_levels: int
    lut_min: float | None
    quantiles: tuple[float, float] | None
    photons_per_mac: float | None
    seed: int


class Place(NamedTuple):
    """Where random numbers stand: int64 0-d tensors `step` and `first_row`, and which product of the layer this is."""

    step: Tensor
    first_row: Tensor
    product: int


class Operands(NamedTuple):
    """x̂ [..., M, K] and ŵ [..., K, N] in float32 or float64, and their ranges."""

    left: Tensor
    right: Tensor
    left_range: Range
    right_range: Range


NARROW_LEVELS = 256
FITS_FLOAT16 = 2**15  # terms, each at most 1: float16 ends at 65504

# Products of a layer.
LINEAR, MATMUL, SCORES, VALUES = range(4)

# Uses of random numbers within a product.
DITHER, RADIUS, ANGLE, LEFT, RIGHT, OUT, USES = range(7)


def convert(x: Tensor, bounds: Range, converters: Converters, *, second: bool) -> Tensor:
    """The operand as the light carries it; only the second one has a smallest magnitude."""
    return quantise(x, bounds, converters.input_levels, converters.lut_min if second else None)


def multiply(operands: Operands, half: bool, levels: int) -> Tensor:
    """left · right. `half`: from float16 values relative to the range's end, summed in float32.

    float16 has 11 significant bits, so an operand is then off by at most 2⁻¹² of its range's end. Up to `NARROW_LEVELS`
    of the output's converter its sums come out as float16 too, off by at most 2⁻¹² of themselves, a sixteenth of half a
    level at 256: they are written and read at half the bytes.
    """
    left, right, left_range, right_range = operands
    if not half:
        return left @ right
    left_size, right_size = left_range.size(), right_range.size()
    left, right = (left / left_size).to(torch.float16), (right / right_size).to(torch.float16)
    if sums_are_narrow(levels, left.shape[-1]):
        product = (left @ right).to(torch.float32)
    elif left.dim() == 2:
        product = torch.mm(left, right, out_dtype=torch.float32)
    else:
        flat = torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out_dtype=torch.float32)
        product = flat.view(*left.shape[:-1], right.shape[-1])
    return product * (left_size * right_size)


def sums_are_narrow(levels: int, terms: int) -> bool:
    """Whether sums of relative operands are stored as float16: fine enough for the output's levels, and they fit."""
    return levels <= NARROW_LEVELS and terms <= FITS_FLOAT16


def detect(
    operands: Operands,
    shape: tuple[int, ...],
    bounds: Range,
    converters: Converters,
    place: Place,
    *,
    half: bool = False,
    attended: Tensor | None = None,
    observe: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Y in `shape`, whose dim 0 are the batch's rows, and with `observe` the range of Y0 where `attended`."""
    product = multiply(operands, half, converters.output_levels).view(shape)
    index = indices(shape, place.first_row, math.prod(shape[1:]))
    if converters.photons_per_mac is not None:
        magnitudes = operands._replace(left=operands.left.abs(), right=operands.right.abs())
        light = multiply(magnitudes, half, converters.output_levels).view(shape)
        photons = converters.photons_per_mac * operands.left.shape[-1]
        radius, angle = _key(converters, place, RADIUS), _key(converters, place, ANGLE)
        product = product + light * photons**-0.5 * normal(index, radius, angle, product.dtype)
    seen = see(product, converters, place, OUT, attended) if observe else ()
    dither = uniform(index, dither_key(converters, place), product.dtype)
    return quantise(product, bounds, converters.output_levels, dither=dither), seen


def see(x: Tensor, converters: Converters, place: Place, use: int, attended: Tensor | None = None) -> Range:
    """The range of x, float32 0-d: its extremes, or the quantiles that `converters` ask for."""
    if converters.quantiles is None:
        return extremes(x, attended)
    return quantiles(x, converters.quantiles, _key(converters, place, use), attended)


def dither_key(converters: Converters, place: Place) -> Key:
    """The key of a product's dither."""
    return _key(converters, place, DITHER)


def dither_words(seed: int, product: int) -> tuple[int, int]:
    """What `dither_key` makes a key of, for a kernel that makes it from the step."""
    return words_of(seed, product * USES + DITHER)


def _key(converters: Converters, place: Place, use: int) -> Key:
    return key_of(converters.seed, place.product * USES + use, place.step)
