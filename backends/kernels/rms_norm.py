"""RMSNorm (arXiv 1910.07467): x / rms(x) · weight, normalised in one dtype and returned in another.

With s = 1 / rms(x), x̂ = s x, g the gradient of the result, and h a gradient that comes to x by another way:

    dx = h + s (g w − x̂ mean(g w x̂)),   dw = Σ over rows of g x̂

The forward is plain torch, which Inductor fuses with what stands before it; where text is written, `inference.py` has
it as one kernel. While a region is traced for a GPU, the backward is an operator made of a Triton kernel: in float32,
whatever the tensors' dtypes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from backends.kernels import inference, triton_rms_norm
from backends.kernels.in_capture import takes_kernels

rms_norm_backward_kernel: Any = None  # the Triton function, once registered
WIDEST = 16384  # what a program can hold of a row


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, norm_dtype: torch.dtype, compute_dtype: torch.dtype) -> Tensor:
    """x [..., D] in any dtype, weight [D] → [..., D] in `compute_dtype`, normalised in `norm_dtype`.

    The one place where an implementation for a device is chosen.
    """
    given = (x, weight, epsilon, norm_dtype, compute_dtype)
    fused = inference.add_rms_norm(x, None, *given[1:])
    if fused is not None:
        return fused[1]
    if torch.is_grad_enabled() and takes_kernels(x) and norm_dtype == torch.float32 and x.shape[-1] <= WIDEST:
        return _RMSNorm.apply(*given)
    return _normed_and_scale(*given)[0]


def _normed_and_scale(
    x: Tensor, weight: Tensor, epsilon: float, norm_dtype: torch.dtype, compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Op for op transformers' Llama."""
    x = x.to(norm_dtype)
    variance = x.pow(2).mean(-1, keepdim=True)
    scale = torch.rsqrt(variance + epsilon)
    return weight.to(compute_dtype) * (x * scale).to(compute_dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
        normed, scale = _normed_and_scale(x, weight, *options)
        ctx.save_for_backward(x, weight, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        register()
        trains_weight = ctx.needs_input_grad[1]
        grad_x, grad_weight = torch.ops.substrate.rms_norm_backward(grad, None, *ctx.saved_tensors, trains_weight)
        return grad_x, grad_weight if trains_weight else None, None, None, None


def rms_norm_backward(
    grad: Tensor, grad_residual: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor, trains_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx like x, dw like weight, empty unless `trains_weight`). grad, grad_residual, x [..., D]; scale [..., 1]."""
    from torch.library import wrap_triton

    grad, x = grad.contiguous(), x.contiguous()
    residual = x if grad_residual is None else grad_residual.contiguous()
    width, num_rows = x.shape[-1], scale.numel()
    rows, warps, most, stages = tiles(width)
    programs = min(-(-num_rows // rows), most)
    grad_x = torch.empty_like(x)
    parts = scale.new_empty((programs if trains_weight else 0, width), dtype=torch.float32)
    block = 1 << (width - 1).bit_length()
    wrap_triton(rms_norm_backward_kernel)[(programs,)](
        grad, residual, x, weight, scale, grad_x, parts, num_rows,
        width, rows, block, stages, grad_residual is not None, trains_weight, num_warps=warps,
    )  # fmt: skip
    return grad_x, parts.sum(0).to(weight.dtype) if trains_weight else weight.new_empty(0)


def tiles(width: int) -> tuple[int, int, int, int]:
    """Rows of a tile, warps, programs at most, pipeline stages. Fixed by shape: a run never tries several."""
    if width <= 512:
        return 1, 1, 2112, 1
    return (1, 4, 528, 3) if width <= 2048 else (1, 8, 528, 1)


@functools.cache
def register() -> None:
    """Define substrate::rms_norm_backward."""
    from torch.library import triton_op

    globals()["rms_norm_backward_kernel"] = triton_rms_norm.compiled_kernel()
    triton_op("substrate::rms_norm_backward", rms_norm_backward, mutates_args=())
