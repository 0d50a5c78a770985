"""A matrix turned and rounded to fp8 in one pass, for products that sum over its rows.

On a GPU one operator made of a Triton kernel. Inductor would compute it inside the kernel that makes the matrix, row by
row, and write single bytes a column apart; or store what goes into it as float32, four times the bytes.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from backends.kernels.fp8 import has_fp8_products
from backends.kernels.triton_functions import compile_in_place

tl: Any = None  # triton.language, once compiled
ROWS, COLUMNS, WARPS = 128, 128, 8  # of a tile


def turned(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """(x · factor)ᵀ [columns, rows], contiguous, in the fp8 `dtype`, for x [rows, columns] of any floating dtype and
    `factor` float32 [rows, 1] or [1, 1]."""
    if has_fp8_products(x.device):
        register()
        result: Tensor = torch.ops.substrate.fp8_turned(x, factor, dtype)
        return result
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) * factor).to(dtype).t().contiguous()


def fp8_turned(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`turned` on a GPU."""
    from torch.library import wrap_triton

    x = x.contiguous()
    rows, columns = x.shape
    out = x.new_empty((columns, rows), dtype=dtype)
    wrap_triton(turned_kernel)[(-(-rows // ROWS), -(-columns // COLUMNS))](
        x, factor, out, rows, columns, factor.numel() > 1, ROWS, COLUMNS, num_warps=WARPS
    )
    return out


def turned_kernel(
    x, factor, out, rows, columns, BY_ROW: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):  # fmt: skip
    """One tile, read along columns and written along rows."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tile = tl.load(x + row.to(tl.int64)[:, None] * columns + column[None, :], inside)
    if BY_ROW:
        scale = tl.load(factor + row, row < rows)[:, None]
    else:
        scale = tl.load(factor)
    tile = (tile.to(tl.float32) * scale).to(out.dtype.element_ty)
    tl.store(out + column.to(tl.int64)[:, None] * rows + row[None, :], tl.trans(tile), tl.trans(inside))


@functools.cache
def register() -> None:
    """Define substrate::fp8_turned."""
    from torch.library import triton_op

    compile_in_place(globals(), turned_kernel)
    triton_op("substrate::fp8_turned", fp8_turned, mutates_args=())
