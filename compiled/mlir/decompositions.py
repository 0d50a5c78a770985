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
        prims.rev.default: _reverse,
        aten.bitwise_xor.Scalar: _with_tensor(torch.bitwise_xor),
        aten.__lshift__.Scalar: _with_tensor(torch.bitwise_left_shift),
        aten.__rshift__.Scalar: _with_tensor(torch.bitwise_right_shift),
        aten.add.Tensor: _with_wide_tensor(torch.add),
        aten.sub.Tensor: _with_wide_tensor(torch.sub),
    }
    if hasattr(prims, "fma"):  # it is there once Inductor's decompositions are, which a region was traced with
        table[prims.fma.default] = _fma
    return {**get_decomposition_table(), **table}


Binary = Callable[[Tensor, Tensor], Tensor]


def _with_tensor(function: Binary) -> Callable[[Tensor, int], Tensor]:
    """Only the form with two tensors is lowered."""
    return lambda x, number: function(x, torch.full_like(x, number))


def _with_wide_tensor(function: Binary) -> Callable[..., Any]:
    """The same for a number that does not fit 32 bits, as which TOSA takes numbers."""

    def call(x: Tensor, other: Any, **options: Any) -> Any:
        if options or not isinstance(other, int) or -(2**31) <= other < 2**31:
            return NotImplemented
        return function(x, torch.full_like(x, other))

    return call


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


def _reverse(x: Tensor, dims: Sequence[int]) -> Tensor:
    """x with its elements along `dims` in reverse, which hold few: the halves of a rotation."""
    for dim in dims:
        x = torch.cat([x.narrow(dim, index, 1) for index in reversed(range(x.shape[dim]))], dim)
    return x


def _slice_scatter(
    x: Tensor, part: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """x with x[start:end] along `dim` replaced; StableHLO's lowering has no such operator."""
    if step != 1:
        return NotImplemented
    length = x.shape[dim]
    first, last = 0 if start is None else start, length if end is None else min(end, length)
    return torch.cat([x.narrow(dim, 0, first), part, x.narrow(dim, last, length - last)], dim)
