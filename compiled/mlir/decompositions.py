"""Operators of a captured region in terms of those that torch-mlir lowers to every dialect."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten, prims = torch.ops.aten, torch.ops.prims


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Operator → what computes it instead; torch-mlir's own table with what it lacks."""
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    table = {
        aten._unsafe_masked_index_put_accumulate.default: _accumulate_rows,
        aten.slice_scatter.default: _slice_scatter,
        aten.bitwise_xor.Scalar: lambda x, number: torch.bitwise_xor(x, torch.full_like(x, number)),
    }
    if hasattr(prims, "fma"):  # it is there once Inductor's decompositions are, which a region was traced with
        table[prims.fma.default] = _fma
    return {**get_decomposition_table(), **table}


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a * b + c


def _accumulate_rows(table: Tensor, mask: Tensor, indices: Sequence[Tensor], values: Tensor) -> Tensor:
    """table[rows] += values where mask: the embedding's gradient. As a product with one-hot rows, which has a fixed
    order of summation; TOSA has no scattered sum, and others take none of bfloat16."""
    (rows,) = indices
    count = table.shape[0]
    numbers = torch.arange(count, dtype=rows.dtype, device=rows.device)
    hot = ((rows.unsqueeze(-1) == numbers) & mask.reshape(rows.shape).unsqueeze(-1)).to(values.dtype)
    return table + hot.reshape(-1, count).t() @ values.reshape(-1, values.shape[-1])


def _slice_scatter(
    x: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """x with x[start:end] along `dim` replaced; StableHLO's lowering has no such operator."""
    if step != 1:
        return NotImplemented
    length = x.shape[dim]
    first, last = 0 if start is None else start, length if end is None else min(end, length)
    return torch.cat([x.narrow(dim, 0, first), part, x.narrow(dim, last, length - last)], dim)
