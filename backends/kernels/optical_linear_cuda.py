"""The optical linear on a GPU: one operator of three passes in Triton around a product of cuBLAS.

Each pass reads its tensor once: x and weight are seen and converted, the product's float16 sums are seen, converted and
written over by the result, so that a forward needs x̂, ŵ and y, and holds y alone when it is done. As for attention
(`optical_attention_cuda.py`) it is one operator in a captured graph and becomes its kernels when that is lowered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backends.kernels import triton_linear
from backends.kernels.optical_product import LINEAR, Converters, dither_words

# Triton functions of the file of kernels, under these names once registered.
operand_kernel: Any = None
result_kernel: Any = None

# Of each pass, whatever its tensor: programs (some fifteen for each processor of an H200), elements that one takes at a
# time (two 16-byte loads a thread), and warps of one.
PROGRAMS, BLOCK, WARPS = 2048, 2048, 4


def linear_with_kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Sequence[Tensor],
    step: Tensor,
    first_row: Tensor,
    converters: Converters,
    *,
    observe: bool,
) -> tuple[Tensor, ...]:
    """y and the ranges seen, as the forward of `optical_linear`, for 16-bit tensors on a GPU."""
    register()
    y, seen = torch.ops.substrate.optical_linear_forward(
        x,
        weight,
        bias,
        list(ranges),
        step,
        first_row,
        converters.seed,
        converters.input_levels,
        converters.output_levels,
        converters.lut_min,
        observe,
    )
    return y, *seen.unbind()


def optical_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ranges: Sequence[Tensor],
    step: Tensor,
    first_row: Tensor,
    seed: int,
    input_levels: int,
    output_levels: int,
    lut_min: float | None,
    observe: bool,
) -> tuple[Tensor, Tensor]:
    """(y [..., N], ranges seen [6] float32 or empty) from what `optical_linear` and its `Converters` hold."""
    rows = x.reshape(-1, x.shape[-1])
    extreme = x.new_empty((3, 2, PROGRAMS) if observe else 0, dtype=torch.float32)
    light_x = convert(rows, ranges[0:2], extreme, 0, input_levels, 0.0, observe)
    light_w = convert(weight, ranges[2:4], extreme, 1, input_levels, lut_min or 0.0, observe)
    sums = light_x @ light_w.t()
    row_size = sums.numel() // (len(x) if x.dim() > 1 else 1)
    words = dither_words(seed, LINEAR)
    y = write_results(sums, bias, ranges, step, first_row, row_size, words, extreme, output_levels, x.dtype, observe)
    if observe:
        extreme = extreme.amin(-1) * (1.0 - 2.0 * torch.arange(2, device=x.device))  # maxima come with the other sign
    return y.view(*x.shape[:-1], len(weight)), extreme.flatten()


def convert(
    x: Tensor, ends: Sequence[Tensor], extreme: Tensor, part: int, levels: int, lut_min: float, observe: bool
) -> Tensor:
    """x [M, K] as the light carries it, relative to its range's end, in float16; its extremes go into a `part`."""
    from torch.library import wrap_triton

    x = x if x.t().is_contiguous() else x.contiguous()
    light, count = torch.empty_like(x, dtype=torch.float16), x.numel()
    wrap_triton(operand_kernel)[(PROGRAMS,)](
        x, light, *ends, extreme, count, part, levels, lut_min, count % BLOCK == 0, observe, BLOCK, num_warps=WARPS
    )
    return light


def write_results(
    sums: Tensor,
    bias: Tensor | None,
    ranges: Sequence[Tensor],
    step: Tensor,
    first_row: Tensor,
    row_size: int,
    words: tuple[int, int],
    extreme: Tensor,
    levels: int,
    dtype: torch.dtype,
    observe: bool,
) -> Tensor:
    """`sums` [M, N] with the results in their place, as `dtype`; their extremes go into the last part."""
    from torch.library import wrap_triton

    count = sums.numel()
    wrap_triton(result_kernel)[(PROGRAMS,)](
        sums, sums if bias is None else bias, *ranges, step, first_row, extreme, count, row_size, 2, *words,
        sums.shape[1], levels, bias is not None, dtype == torch.bfloat16, count % BLOCK == 0, observe, BLOCK,
        num_warps=WARPS,
    )  # fmt: skip
    return sums.view(dtype)


@torch.compiler.assume_constant_result  # `torch.compile` calls it and does not look inside
def register() -> None:
    """Define substrate::optical_linear_forward, once."""
    if operand_kernel is not None:
        return
    from torch.library import triton_op
    from torch.utils.flop_counter import register_flop_formula

    triton_linear.compile_kernels()
    globals()["operand_kernel"] = triton_linear.operand_kernel
    globals()["result_kernel"] = triton_linear.result_kernel
    triton_op("substrate::optical_linear_forward", optical_linear_forward, mutates_args=())
    register_flop_formula(torch.ops.substrate.optical_linear_forward)(_flops)


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Those of the plain product, from shapes."""
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]
