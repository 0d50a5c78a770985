"""Triton: the backward of RMSNorm, input and weight in one sweep over the rows.

A program takes every n-th row and sums its part of the weight's gradient in registers, so that all sums have one fixed
order; the parts are added behind the kernel.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels.triton_functions import compile_in_place

tl: Any = None


def rms_norm_backward_kernel(
    grad_normed, grad_residual, x, weight, scales, grad_x, parts, num_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, RESIDUAL: tl.constexpr,
    WEIGHT: tl.constexpr,
):  # fmt: skip
    """Grid (parts); tiles are ROWS × BLOCK, BLOCK ≥ WIDTH. `rms_norm.py` has the formulas."""
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    part = tl.zeros((ROWS, BLOCK), tl.float32)
    step = tl.num_programs(0) * ROWS
    for first in tl.range(tl.program_id(0) * ROWS, num_rows, step, num_stages=STAGES):
        rows = first + tl.arange(0, ROWS)
        place = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        mask = (rows < num_rows)[:, None] & inside[None, :]
        scale = tl.load(scales + rows, mask=rows < num_rows, other=0.0).to(tl.float32)[:, None]
        unit = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_normed + place, mask=mask, other=0.0).to(tl.float32)
        if WEIGHT:
            part += grad * unit
        grad *= gain
        along = tl.sum(grad * unit, 1)[:, None] / WIDTH
        grad = (grad - unit * along) * scale
        if RESIDUAL:
            grad += tl.load(grad_residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x + place, grad.to(grad_x.dtype.element_ty), mask=mask)
    if WEIGHT:
        tl.store(parts + tl.program_id(0) * WIDTH + columns, tl.sum(part, 0), mask=inside)


def compiled_kernel() -> Any:
    """The kernel as a Triton function."""
    compile_in_place(globals(), rms_norm_backward_kernel)
    return globals()["rms_norm_backward_kernel"]
