"""Triton: the passes of an optical linear around its product, each over its tensor once.

A program takes every PROGRAMS-th block of a tensor in the order of memory, and leaves the minimum and the negated
maximum of all it has read: part PART of `extreme` [3, 2, PROGRAMS] is whole whatever the tensor's size.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels import triton_quantiser
from backends.kernels.triton_functions import compile_in_place

tl: Any = None
size_of: Any = None
mixed: Any = None
random_number: Any = None


def lower(a, b):
    """The smaller one, or NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


def higher(a, b):
    """The larger one, or NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


def rounded_level(position, top_level):
    """The level nearest to a position in the range, from 0 to 1 or beyond; 0 for NaN: add 0 · x to have NaN and ∞ show.

    This clamp costs nothing, being how the addition before it ends. 1.5 · 2²³, added and subtracted, rounds to a whole
    number, ties to even. A range of no width comes as ±∞ or NaN, and as 0 levels.
    """
    return (tl.minimum(tl.maximum(position, 0.0), 1.0) * top_level + 12582912.0) - 12582912.0


def block_extremes(value, inside, BLOCK: tl.constexpr):
    """Minima and maxima of each eight neighbours, which one thread holds: nothing is exchanged."""
    infinity = float("inf")
    smallest = tl.reduce(tl.reshape(tl.where(inside, value, infinity), [BLOCK // 8, 8]), 1, lower)
    largest = tl.reduce(tl.reshape(tl.where(inside, value, -infinity), [BLOCK // 8, 8]), 1, higher)
    return smallest, largest


def store_extremes(extreme, part, smallest, largest, unit):
    """A program's two numbers, in multiples of 1 / `unit`."""
    extreme += 2 * part * tl.num_programs(0) + tl.program_id(0)
    tl.store(extreme, tl.reduce(smallest, 0, lower) * unit)
    tl.store(extreme + tl.num_programs(0), -tl.reduce(largest, 0, higher) * unit)


def operand_kernel(
    x, light, first, last, extreme, count, PART: tl.constexpr, LEVELS: tl.constexpr, LUT_MIN: tl.constexpr,
    EVEN: tl.constexpr, OBSERVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """light = Q(x) relative to the larger end of its range, which lies at `first` and `last`; else x as it is."""
    infinity = float("inf")
    low, high = tl.load(first), tl.load(last)
    known = (tl.abs(low) < infinity) & (tl.abs(high) < infinity)
    size, width = size_of(low, high), high - low
    slope, top_level = 1.0 / width, (LEVELS - 1) * (width / (width + 1e-8))
    step, base = width / (LEVELS - 1) / size, low / size
    top, bottom = LUT_MIN * high / size, -LUT_MIN * tl.abs(low) / size
    nothing = 4.76837158203125e-07  # 4 · 2⁻²³: as in `quantise`, a level that is 0 on paper is not lifted
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    smallest = tl.full([BLOCK // 8], infinity, tl.float32)
    largest = tl.full([BLOCK // 8], -infinity, tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
        place = start + offsets
        inside = (place < count) | EVEN
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if OBSERVE:
            block_smallest, block_largest = block_extremes(value, inside, BLOCK)
            smallest, largest = lower(smallest, block_smallest), higher(largest, block_largest)
        relative = rounded_level((value - low) * slope, top_level) * step + (base + value * 0.0)
        if LUT_MIN > 0:
            relative = tl.where((relative > nothing) & (relative < top), top, relative)
            relative = tl.where((relative < -nothing) & (relative > bottom), bottom, relative)
        relative = tl.where(known, relative, value)
        tl.store(light + place, relative.to(light.dtype.element_ty), mask=inside)
    if OBSERVE:
        store_extremes(extreme, PART, smallest, largest, 1.0)


def result_kernel(
    sums, bias, x_first, x_last, w_first, w_last, out_first, out_last, number, first_row, extreme, count, row_size,
    PART: tl.constexpr, FIRST_WORD: tl.constexpr, SECOND_WORD: tl.constexpr, COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr, BIAS: tl.constexpr, BFLOAT16: tl.constexpr, EVEN: tl.constexpr, OBSERVE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Over the float16 `sums` of relative operands their dithered and converted value, plus `bias`, as 16-bit floats.

    `number` int64 and the two words: what `dither.key_of` makes a key of; `row_size`: elements of a row of the batch.
    """
    infinity = float("inf")
    scale = size_of(tl.load(x_first), tl.load(x_last)) * size_of(tl.load(w_first), tl.load(w_last))
    low, high = tl.load(out_first), tl.load(out_last)
    known = (tl.abs(low) < infinity) & (tl.abs(high) < infinity)
    width = high - low
    top_level, step = (LEVELS - 1) * (width / (width + 1e-8)), width / (LEVELS - 1)
    slope, gain = scale / width, 1.0 / top_level
    shift = -low / width - 1.5 * gain  # 1.5: random numbers come as ξ + 1.5
    number = tl.load(number)
    first = mixed(number.to(tl.uint32) ^ FIRST_WORD, (number >> 32).to(tl.uint32))
    second = mixed(first ^ SECOND_WORD, 0)
    first, second = first ^ (first >> 16), second ^ (second >> 15)  # `random_number` wants them so
    index = (tl.load(first_row) * row_size).to(tl.uint32)
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    smallest = tl.full([BLOCK // 8], infinity, tl.float32)
    largest = tl.full([BLOCK // 8], -infinity, tl.float32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, count, tl.num_programs(0) * BLOCK):
        place = start + offsets
        inside = (place < count) | EVEN
        raw = tl.load(sums + place, mask=inside, other=0.0).to(tl.float32)
        if OBSERVE:
            block_smallest, block_largest = block_extremes(raw, inside, BLOCK)
            smallest, largest = lower(smallest, block_smallest), higher(largest, block_largest)
        random = random_number(index + place.to(tl.uint32), first, second)
        result = rounded_level(raw * slope + (random * gain + shift), top_level) * step + (low + raw * 0.0)
        result = tl.where(known, result, raw * scale)
        if BIAS:
            column = (start % COLUMNS + offsets).to(tl.int32) % COLUMNS
            if COLUMNS % 8 == 0:
                column = tl.max_contiguous(tl.multiple_of(column, 8), 8)
            result += tl.load(bias + column).to(tl.float32)
        if BFLOAT16:
            tl.store(sums + place, result.to(tl.bfloat16).to(tl.float16, bitcast=True), mask=inside)
        else:
            tl.store(sums + place, result.to(tl.float16), mask=inside)
    if OBSERVE:
        store_extremes(extreme, PART, smallest, largest, scale)


def compile_kernels() -> None:
    """Make this file's functions, and those they call, Triton functions."""
    globals().update(vars(triton_quantiser.compiled_functions()))
    compile_in_place(
        globals(), lower, higher, rounded_level, block_extremes, store_extremes, operand_kernel, result_kernel
    )
