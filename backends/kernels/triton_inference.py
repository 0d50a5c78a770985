"""Triton: what stands between a Llama's products when nothing is differentiated, one pass each.

Each intermediate result is rounded where the plain operators round it, so that only the order of a row's sum and the
last bit of an exponential differ.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels.triton_functions import compile_in_place

tl: Any = None


def add_rms_norm_kernel(
    x, update, weight, total, normed, epsilon, WIDTH: tl.constexpr, BLOCK: tl.constexpr, UPDATE: tl.constexpr
):  # fmt: skip
    """total = x + update (x without UPDATE), normed = total / rms(total) · weight. Grid (rows), BLOCK ≥ WIDTH."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    place = tl.program_id(0).to(tl.int64) * WIDTH + columns
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if UPDATE:
        added = tl.load(update + place, mask=inside, other=0.0).to(x.dtype.element_ty).to(tl.float32)
        rounded = (wide + added).to(x.dtype.element_ty)
        tl.store(total + place, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + epsilon)
    unit = (wide * scale).to(normed.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(normed.dtype.element_ty).to(tl.float32)
    tl.store(normed + place, (unit * gain).to(normed.dtype.element_ty), mask=inside)


def rotate_kernel(
    x, cos, sin, turned, heads, length, x_batch, x_head, x_row, turned_batch, turned_head, turned_row,
    table_batch, table_row, HALF: tl.constexpr, PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Channels i and i + HALF of every head by their position's angle. Grid (batch · length, tiles of HEADS)."""
    batch = (tl.program_id(0) // length).to(tl.int64)
    row = (tl.program_id(0) % length).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None].to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < HALF)
    angle = batch * table_batch + row * table_row + pair
    source = x + batch * x_batch + row * x_row + head * x_head + pair
    target = turned + batch * turned_batch + row * turned_row + head * turned_head + pair
    dtype = turned.dtype.element_ty
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    for half in tl.static_range(2):
        known = pair < HALF
        along = tl.load(cos + angle + half * HALF, mask=known, other=0.0).to(tl.float32)
        across = tl.load(sin + angle + half * HALF, mask=known, other=0.0).to(tl.float32)
        if half == 0:
            kept, other = first * along, -second * across
        else:
            kept, other = second * along, first * across
        sum_of_both = kept.to(dtype).to(tl.float32) + other.to(dtype).to(tl.float32)
        tl.store(target + half * HALF, sum_of_both.to(dtype), mask=inside)


def gated_silu_kernel(gate, up, gated, count, BLOCK: tl.constexpr):
    """silu(gate) · up, element by element. Grid (blocks of BLOCK)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    wide = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    dtype = gated.dtype.element_ty
    opened = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
    product = opened * tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(gated + place, product.to(dtype), mask=inside)


def compiled_kernels() -> tuple[Any, Any, Any]:
    """The three kernels as Triton functions: add_rms_norm, rotate, gated_silu."""
    functions = (add_rms_norm_kernel, rotate_kernel, gated_silu_kernel)
    compile_in_place(globals(), *functions)
    return tuple(globals()[name] for name in ("add_rms_norm_kernel", "rotate_kernel", "gated_silu_kernel"))
