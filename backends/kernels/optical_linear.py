"""The optical linear layer and matrix product, with the straight-through backward of the plain ones.

The gradients are those of x wᵀ at the tensors as they came in, before any conversion: dX = dY W, dW = dYᵀ X, db = Σ dY.
Nothing is kept for the backward but these.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.kernels.optical_product import (
    LEFT,
    LINEAR,
    MATMUL,
    RIGHT,
    Converters,
    Operands,
    Place,
    convert,
    detect,
    see,
    sums_are_narrow,
)
from backends.kernels.quantise import Range, split_ranges, wide_dtype


def optical_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: tuple[Tensor, ...],
    step: Tensor,
    first_row: Tensor,
    converters: Converters,
    *,
    observe: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y [..., N] = Q(x̂ ŵᵀ) + bias for x [..., K], weight [N, K], bias [N]; and the ranges seen, float32 0-d.

    `ranges` (before the step) and what is seen: x min, x max, w min, w max, out min, out max. `step`, `first_row`
    int64 0-d; the upper 32 bits of `step` tell layers apart. Without `observe` nothing is seen. The one place where an
    implementation for a device is chosen.
    """
    y, *seen = _OpticalLinear.apply(x, weight, bias, step, first_row, converters, observe, *ranges)
    return y, tuple(seen)


def optical_matmul(
    a: Tensor,
    b: Tensor,
    ranges: tuple[Tensor, ...],
    step: Tensor,
    first_row: Tensor,
    converters: Converters,
    *,
    observe: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out [B, H, M, N] = Q(â b̂) for a [B, H, M, K], b [B, H, K, N]; ranges of a, b, out as for `optical_linear`."""
    y, *seen = _OpticalMatmul.apply(a, b, torch.stack(ranges), step, first_row, converters, observe)
    return y, tuple(seen)


def runs_in_half(x: Tensor) -> bool:
    """Whether products take float16 operands: on a GPU for 16-bit tensors."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


class _OpticalLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        step: Tensor,
        first_row: Tensor,
        converters: Converters,
        observe: bool,
        *ranges: Tensor,
    ) -> tuple[Tensor, ...]:
        if _has_kernels(x, weight, converters):
            from backends.kernels.optical_linear_cuda import linear_with_kernels

            return linear_with_kernels(x, weight, bias, ranges, step, first_row, converters, observe=observe)
        x_range, w_range, out_range = (Range(*ranges[place : place + 2]) for place in (0, 2, 4))
        place, wide = Place(step, first_row, LINEAR), wide_dtype(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        left = convert(rows.to(wide), x_range, converters, second=False)
        right = convert(weight.to(wide), w_range, converters, second=True).t()
        operands = Operands(left, right, x_range, w_range)
        shape = (*x.shape[:-1], len(weight)) if x.dim() > 1 else (1, len(weight))  # a vector is a batch of one row
        y, seen = detect(operands, shape, out_range, converters, place, half=runs_in_half(x), observe=observe)
        if observe:
            seen = (*see(rows, converters, place, LEFT), *see(weight, converters, place, RIGHT), *seen)
        if bias is not None:
            y = y + bias.to(wide)
        return y.to(x.dtype).view(*x.shape[:-1], len(weight)), *seen

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        needs = ctx.needs_input_grad
        grad_x = (rows @ weight).view(x.shape) if needs[0] else None
        grad_weight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        grad_bias = rows.sum(0) if needs[2] else None
        return (grad_x, grad_weight, grad_bias, *(None for _ in needs[3:]))


def _has_kernels(x: Tensor, weight: Tensor, converters: Converters) -> bool:
    """Whether the Triton kernels compute this: 16-bit on a GPU, ranges by extremes, no shot noise, float16 sums."""
    plain = converters.quantiles is None and converters.photons_per_mac is None
    narrow = sums_are_narrow(converters.output_levels, weight.shape[1])
    return runs_in_half(x) and weight.dtype == x.dtype and x.numel() > 0 and plain and narrow


class _OpticalMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        a: Tensor, b: Tensor, ranges: Tensor, step: Tensor, first_row: Tensor, converters: Converters, observe: bool
    ) -> tuple[Tensor, ...]:
        a_range, b_range, out_range = split_ranges(ranges)
        place, wide = Place(step, first_row, MATMUL), wide_dtype(a.dtype)
        left = convert(a.to(wide), a_range, converters, second=False)
        right = convert(b.to(wide), b_range, converters, second=True)
        operands, shape = Operands(left, right, a_range, b_range), (*a.shape[:-1], b.shape[-1])
        y, seen = detect(operands, shape, out_range, converters, place, half=runs_in_half(a), observe=observe)
        if observe:
            seen = (*see(a, converters, place, LEFT), *see(b, converters, place, RIGHT), *seen)
        return y.to(a.dtype), *seen

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_a = grad @ b.mT if needs[0] else None
        grad_b = a.mT @ grad if needs[1] else None
        return (grad_a, grad_b, *(None for _ in needs[2:]))
