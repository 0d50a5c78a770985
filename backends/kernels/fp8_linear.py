"""The linear layer whose three products, forward and backward, take fp8 operands.

    Y  = X̂ Ŵᵀ      X̂, Ŵ: e4m3, a scale for each row (token, output feature) or one for the tensor
    dX = Ĝ Ŵ       Ĝ: the output's gradient, e5m2 or e4m3, scaled in the same way; Ŵ under one scale
    dW = (Ĝ S)ᵀ X̂  S: powers of two that bring the scales of Ĝ's and X̂'s rows, which are summed over, to one

An fp8 product wants both operands along the sum, so that W, X̂ and Ĝ are also needed turned. X̂ and Ĝ are turned as the
fp8 numbers they are, and no largest number is looked for along columns: a tensor is read once in its own dtype.

X̂ and W's scales are made again in the backward. So eager PyTorch keeps nothing in fp8, while in a captured step equal
casts are one node, which the partitioner keeps or makes again by what costs less.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends.kernels.fp8 import E4M3, Scaled, aligned, multiply, power_of_two, scale_of, to_fp8
from backends.kernels.fp8_turned import turned


class Recipe(NamedTuple):
    """What is compiled into a region: the output gradient's fp8 dtype, one scale a row or a tensor, whether dW is an
    fp8 product, and where a GPU may sum with fewer bits."""

    grad_dtype: torch.dtype
    by_row: bool
    fp8_grad_weight: bool
    fast_forward: bool
    fast_backward: bool


def fp8_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """y [..., N] = x [..., K] · weight [N, K]ᵀ with fp8 operands, in x's dtype; any sizes but empty ones."""
    y: Tensor = _Fp8Linear.apply(x, weight, recipe)
    return y


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        rows, columns = _rows(x), len(weight)
        y = multiply(_operand(rows, recipe), _operand(weight, recipe), x.dtype, fast=recipe.fast_forward)
        return _cut(y, len(rows), columns).reshape(*x.shape[:-1], columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.recipe = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), recipe = ctx.saved_tensors, ctx.recipe
        rows, grad_rows = _rows(x), _rows(grad)
        grad_x = grad_weight = None
        rounded = to_fp8(aligned(grad_rows), recipe.grad_dtype, by_row=recipe.by_row)
        if ctx.needs_input_grad[1]:
            if recipe.fp8_grad_weight:
                grad_weight = _grad_weight(rounded, _operand(rows, recipe), recipe, weight.dtype)
                grad_weight = _cut(grad_weight, *weight.shape)
            else:
                grad_weight = grad_rows.t() @ rows
        if ctx.needs_input_grad[0]:
            grad_x = multiply(rounded, _turned_weight(weight, recipe), x.dtype, fast=recipe.fast_backward)
            grad_x = _cut(grad_x, *rows.shape).reshape(x.shape)
        return grad_x, grad_weight, None


def _turned_weight(weight: Tensor, recipe: Recipe) -> Scaled:
    """Wᵀ [K, N] under one scale: that of the row with the largest, whose factor is the smallest (or NaN)."""
    exponent, factor = scale_of(aligned(weight), E4M3, by_row=recipe.by_row)
    return Scaled(turned(aligned(weight), factor.amin(0, keepdim=True), E4M3), exponent.amax(0, keepdim=True))


def _grad_weight(grad: Scaled, x: Scaled, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """Gᵀ X of fp8 G [T, N], X [T, K], whose rows are summed over: the scales of X's rows go to G's, and G's to one.

    Numbers of the rows below the largest scale go down by a power of two: exactly, until they fall below the format's
    normal range, which takes 2⁻¹⁴ of the largest one in e4m3, 2⁻²⁹ in e5m2.
    """
    exponent = grad.exponent + x.exponent
    top = exponent.amax(0, keepdim=True)
    one = torch.zeros_like(top)
    left = Scaled(turned(grad.values, power_of_two(exponent - top), grad.values.dtype), top)
    right = Scaled(turned(x.values, power_of_two(one), x.values.dtype), one)
    return multiply(left, right, dtype, fast=recipe.fast_backward)


def _operand(x: Tensor, recipe: Recipe) -> Scaled:
    return to_fp8(aligned(x), E4M3, by_row=recipe.by_row)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _cut(x: Tensor, rows: int, columns: int) -> Tensor:
    """x without what `aligned` added."""
    return x.narrow(0, 0, rows).narrow(1, 0, columns)
