"""Optical attention on a GPU: the Triton kernels as two operators that a compiled region takes in whole.

A `triton_op` is an operator with a schema in a captured graph, and becomes its kernels when the graph is lowered:
Inductor compiles them with its own and their binaries travel in the region. They are registered when the first GPU
tensor comes, so that nothing here needs Triton before.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from backends.kernels import triton_attention_backward, triton_attention_forward

attention_forward_kernel = attention_grad_query_kernel = attention_grad_key_kernel = None


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plain_v: Tensor,
    ranges: Tensor,
    keys: Tensor,
    first_row: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    input_levels: int,
    output_levels: int,
    observe: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax · v unquantised, log₂-sum-exp of the rows, [score min, −max, out min, −max]).

    q [B, H, S, D], k, v [B, G, S_kv, D]: float16, converted and divided by the size of their range; plain_v: v as given,
    whose dtype out has. ranges float32 [10] of q, k, v, scores, out; keys int32 [4] for the dither of scores and out.
    Without `save` the second and third are empty, without `observe` the fourth is.
    """
    from torch.library import wrap_triton

    batch, heads, queries, head_dim = q.shape
    value_dim, rows, cols, warps, stages = v.shape[-1], *forward_tiles(q.shape[-1])
    # rows of all heads side by side: what follows wants them so
    out = plain_v.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    plain_out = torch.empty_like(out) if save else out.new_empty(0)
    logsums = ranges.new_empty((batch, heads, queries) if save else 0)
    blocks = -(-queries // rows)
    observed = ranges.new_empty((batch * heads * blocks, 4) if observe else 0)
    causal = is_causal and mask is None and queries > 1
    spans = ranges if mask is None else attended_spans(mask, rows)
    wrap_triton(attention_forward_kernel)[(blocks, batch * heads)](
        q, k, v, plain_v, ranges, keys, first_row, q if mask is None else mask, spans,
        out, plain_out, logsums, observed,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *plain_v.stride()[:3], *out.stride()[:3],
        *mask_strides(mask), queries, k.shape[2], scale,
        heads, k.shape[1], head_dim, value_dim, input_levels, output_levels, rows, cols, causal, mask is not None,
        save, observe, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, plain_out, logsums, observed.amin(0) if observe else observed


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    plain_q: Tensor,
    plain_k: Tensor,
    plain_v: Tensor,
    plain_out: Tensor,
    logsums: Tensor,
    ranges: Tensor,
    keys: Tensor,
    first_row: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    output_levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v as given (plain_…), from what `attention_forward` took and saved."""
    from torch.library import wrap_triton

    batch, heads, queries, head_dim = q.shape
    groups, length, value_dim = *k.shape[1:3], plain_v.shape[-1]
    causal = is_causal and mask is None and queries > 1
    grad_q, grad_k, grad_v = torch.empty_like(plain_q), torch.empty_like(plain_k), torch.empty_like(plain_v)
    deltas = torch.empty_like(logsums)
    rows, cols, warps, stages = grad_query_tiles(head_dim)
    wrap_triton(attention_grad_query_kernel)[(-(-queries // rows), batch * heads)](
        q, k, plain_k, plain_v, grad_out, plain_out, logsums, ranges, keys, first_row, q if mask is None else mask,
        ranges if mask is None else attended_spans(mask, rows), grad_q, deltas,
        *q.stride()[:3], *k.stride()[:3], *plain_k.stride()[:3], *plain_v.stride()[:3], *grad_out.stride()[:3],
        *plain_out.stride()[:3], *grad_q.stride()[:3], *mask_strides(mask), queries, length, scale,
        heads, groups, head_dim, value_dim, output_levels, rows, cols, causal, mask is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    rows, cols, warps, stages = grad_key_tiles(head_dim)
    wrap_triton(attention_grad_key_kernel)[(-(-length // cols), batch * groups)](
        q, k, plain_q, plain_v, grad_out, logsums, deltas, ranges, keys, first_row, q if mask is None else mask,
        ranges if mask is None else attended_spans(mask.transpose(-1, -2), cols), grad_k, grad_v,
        *q.stride()[:3], *k.stride()[:3], *plain_q.stride()[:3], *plain_v.stride()[:3], *grad_out.stride()[:3],
        *grad_k.stride()[:3], *grad_v.stride()[:3], *mask_strides(mask), queries, length, scale,
        heads, groups, head_dim, value_dim, output_levels, rows, cols, causal, mask is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def forward_tiles(head_dim: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, pipeline stages. Fixed by shape: a run never tries several."""
    return (128, 64, 8, 3) if head_dim <= 64 else (128, 64, 8, 2)


def grad_query_tiles(head_dim: int) -> tuple[int, int, int, int]:
    """As `forward_tiles`, for dQ."""
    return (128, 64, 8, 3) if head_dim <= 64 else (128, 64, 8, 2)


def grad_key_tiles(head_dim: int) -> tuple[int, int, int, int]:
    """As `forward_tiles`, for dK and dV."""
    return (64, 128, 8, 3) if head_dim <= 64 else (64, 128, 8, 2)


def mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Elements from one batch entry, query and key to the next; 0 where the mask is broadcast."""
    if mask is None:
        return 0, 0, 0
    return mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(-2), mask.stride(-1)


def attended_spans(mask: Tensor, block: int) -> Tensor:
    """For each block of the mask's dim −2, the first and one past the last attended index of dim −1: int32 [B, blocks, 2].

    A sweep over these keys only costs as much as the mask lets through, for causal masks and articles alike.
    """
    batch, _, queries, keys = mask.shape
    blocks = -(-queries // block)
    padded = torch.nn.functional.pad(mask[:, 0], (0, 0, 0, blocks * block - queries))
    attended = padded.reshape(batch, blocks, block, keys).any(2)
    index = torch.arange(keys, dtype=torch.int32, device=mask.device)
    first = torch.where(attended, index, keys).amin(-1)
    last = torch.where(attended, index + 1, 0).amax(-1)
    return torch.stack((first, last), -1).to(torch.int32)


@functools.cache
def register() -> None:
    """Define substrate::optical_attention_forward and …_backward."""
    from torch.library import triton_op

    triton_attention_backward.compile_kernels()
    for module in (triton_attention_forward, triton_attention_backward):
        for name in ("attention_forward_kernel", "attention_grad_query_kernel", "attention_grad_key_kernel"):
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
    triton_op("substrate::optical_attention_forward", attention_forward, mutates_args=())
    triton_op("substrate::optical_attention_backward", attention_backward, mutates_args=())
