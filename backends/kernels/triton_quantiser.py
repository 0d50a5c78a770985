"""Inside a kernel: the converters of `quantise.py` with a range read by pointer, and the random numbers of `dither.py`.

A value is converted as `level = rint(clamp(value · slope + shift + random · gain, low, high))` and means
`level · step + base`. While its range is not known, gain and the rounding constant are 0 and the bounds infinite: the
same instructions then let the value through.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from backends.kernels.triton_functions import compile_in_place

tl: Any = None  # triton.language, once a kernel is asked for


def size_of(low, high):
    """`Range.size`: what operands are divided by."""
    size = tl.maximum(tl.abs(low), tl.abs(high))
    return tl.where((size > 0.0) & (size < float("inf")), size, 1.0)


def range_size(pointer):
    """`size_of` the two floats at `pointer`."""
    return size_of(tl.load(pointer), tl.load(pointer + 1))


def converter(pointer, unit, LEVELS: tl.constexpr):
    """(slope, shift, gain, low, high, rounder, step, base) for values given in multiples of `unit`."""
    infinity = float("inf")
    first, last = tl.load(pointer), tl.load(pointer + 1)
    known = (tl.abs(first) < infinity) & (tl.abs(last) < infinity)
    base, width = tl.where(known, first, 0.0), tl.where(known, last - first, 1.0)
    per_value = (LEVELS - 1) / (width + 1e-8)
    slope = tl.where(known, unit * per_value, unit)
    shift = tl.where(known, -base * per_value - 1.5, 0.0)  # 1.5: random numbers come as ξ + 1.5
    low, high = tl.where(known, 0.0, -infinity), tl.where(known, LEVELS - 1.0, infinity)
    # 1.5 · 2²³: adding and subtracting it rounds to a whole number, ties to even, in two additions
    rounder = tl.where(known, 12582912.0, 0.0)
    step = tl.where(known, width / (LEVELS - 1), 1.0)
    return slope, shift, tl.where(known, 1.0, 0.0), low, high, rounder, step, base


def mixed(word, second):
    """`dither._mix` of uint32 numbers."""
    word = ((word ^ (word >> 16)) * 0x7FEB352D) ^ second
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


def random_number(index, first, second):
    """ξ + 1.5 in [1, 2) for a uint32 index: `dither.uniform` to 23 bits, which become the significand of a float.

    first, second: `kernel_words` of the key.
    """
    word = (index ^ (index >> 16) ^ first) * 0x7FEB352D
    word = (word ^ (word >> 15) ^ second) * 0x846CA68B
    # word ^ word >> 16, its upper 23 bits, with the upper one flipped because `dither` takes the word as signed
    return ((word >> 9) ^ (word >> 25) ^ 0x3FC00000).to(tl.float32, bitcast=True)


def converted_level(value, random, slope, shift, gain, low, high, rounder):
    """The level of `value` with random = ξ + 1.5. NaN stays NaN."""
    position = value * slope + shift + random * gain
    position = tl.maximum(position, low, propagate_nan=tl.PropagateNan.ALL)
    position = tl.minimum(position, high, propagate_nan=tl.PropagateNan.ALL)
    return (position + rounder) - rounder


def compiled_functions() -> SimpleNamespace:
    """This file's functions as Triton functions, for the file of a kernel that calls them."""
    functions = (size_of, range_size, converter, mixed, random_number, converted_level)
    compile_in_place(globals(), *functions)
    return SimpleNamespace(**{function.__name__: globals()[function.__name__] for function in functions})
