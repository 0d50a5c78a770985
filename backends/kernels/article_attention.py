"""Causal attention inside articles on a GPU, as two operators made of Triton kernels; no tensor has the scores' size.

    P = softmax(q kᵀ · scale) over the keys of the query's article up to the query,   out = P v
    dV = Pᵀ dO,  dS = P ∘ (dO vᵀ − Σ dO ∘ O) · scale,  dQ = dS k,  dK = dSᵀ q        (arXiv 2205.14135)

P is made again from the log-sum of each row. Every sum has one fixed order: two runs give the same bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends.kernels import triton_article_backward, triton_article_forward
from backends.kernels.in_capture import takes_kernels

# Triton functions, under these names once registered.
article_forward_kernel: Any = None
article_grad_query_kernel: Any = None
article_grad_key_kernel: Any = None

LOG2_E = math.log2(math.e)


class Tiles(NamedTuple):
    """Packed rows and keys of a tile, warps, pipeline stages; `split`: tiles without a mask have their own loop."""

    rows: int
    keys: int
    warps: int
    stages: int
    split: bool = True


def has_article_kernels(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether the kernels compute this: while traced for a GPU, in 16 bits, each token a query and a key."""
    fits = q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] == v.shape[-1] and q.shape[-1] in (64, 128)
    return takes_kernels(q) and fits and q.shape[2] == k.shape[2] and scale > 0


def article_attention(q: Tensor, k: Tensor, v: Tensor, articles: Tensor, scale: float) -> Tensor:
    """out [B, H, S, D] like q, for k and v [B, G, S, D] and articles int32 [2, B, S] (see backends/articles.py)."""
    register()
    return _ArticleAttention.apply(q, k, v, articles, scale)


class _ArticleAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, articles: Tensor, scale: float) -> Tensor:
        out, logsums = torch.ops.substrate.article_attention_forward(q, k, v, articles, scale)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, out, logsums, articles)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.substrate.article_attention_backward(grad, *ctx.saved_tensors, ctx.scale)
        return (*gradients, None, None)


def article_attention_forward(q: Tensor, k: Tensor, v: Tensor, articles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, log₂ of each row's softmax denominator, float32 [B, H · S] in the kernels' order of rows)."""
    from torch.library import wrap_triton

    q, k, v = _readable(q), _readable(k), _readable(v)
    batch, heads, length, head_dim = q.shape
    tiles, pack = forward_tiles(head_dim), packed_heads(heads, k.shape[1])
    # heads of one token side by side: the layer that follows wants them so
    out = q.new_empty(batch, length, heads, head_dim).transpose(1, 2)
    logsums = q.new_empty((batch, heads * length), dtype=torch.float32)
    units = heads // pack
    wrap_triton(article_forward_kernel)[(-(-length * pack // tiles.rows), batch * units)](
        q, k, v, articles, out, logsums, length, *_strides(q, k, v, out),
        scale * LOG2_E, units, k.shape[1], pack, head_dim, tiles.rows, tiles.keys, tiles.split,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out, logsums


def article_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsums: Tensor,
    articles: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v, from what `article_attention_forward` took and gave."""
    from torch.library import wrap_triton

    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad, q, k, v = (_readable(x) for x in (grad, q, k, v))
    batch, heads, length, head_dim = q.shape
    groups, deltas = k.shape[1], torch.empty_like(logsums)
    pack = packed_heads(heads, groups)
    units = heads // pack
    tiles = grad_query_tiles(head_dim)
    wrap_triton(article_grad_query_kernel)[(-(-length * pack // tiles.rows), batch * units)](
        q, k, v, grad, out, logsums, articles, grad_q, deltas, length, *_strides(q, k, v, grad, out, grad_q),
        scale, scale * LOG2_E, units, groups, pack, head_dim, tiles.rows, tiles.keys, tiles.split,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    tiles = grad_key_tiles(head_dim)
    wrap_triton(article_grad_key_kernel)[(-(-length // tiles.keys), batch * groups)](
        q, k, v, grad, logsums, deltas, articles, grad_k, grad_v, batch, length,
        *_strides(q, k, v, grad, grad_k, grad_v),
        scale, scale * LOG2_E, units, groups, pack, head_dim, tiles.rows, tiles.keys, tiles.split,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def packed_heads(heads: int, groups: int) -> int:
    """How many query heads of one key head lie in a tile: the largest power of 2 that divides them, 8 at most."""
    ratio = heads // groups
    return min(ratio & -ratio, 8)


def forward_tiles(head_dim: int) -> Tiles:
    """Fixed by shape: a run never tries several. All fit into the 99 KiB that the smaller GPUs share in a block."""
    return Tiles(128, 64, 8, 3) if head_dim <= 64 else Tiles(128, 64, 8, 2)


def grad_query_tiles(head_dim: int) -> Tiles:
    """As `forward_tiles`, for dQ."""
    return Tiles(64, 64, 4, 2)


def grad_key_tiles(head_dim: int) -> Tiles:
    """As `forward_tiles`, for dK and dV."""
    return Tiles(64, 128, 8, 2) if head_dim <= 64 else Tiles(32, 128, 8, 2)


def _readable(x: Tensor) -> Tensor:
    """x with elements of its last dim side by side, as the kernels read them; a gradient may be an expanded number."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of dims 0, 1, 2; the last one is 1 wherever a kernel reads or writes."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


@functools.cache
def register() -> None:
    """Define substrate::article_attention_forward and substrate::article_attention_backward."""
    from torch.library import triton_op
    from torch.utils.flop_counter import register_flop_formula

    triton_article_forward.compile_kernels()
    triton_article_backward.compile_kernels()
    globals()["article_forward_kernel"] = triton_article_forward.article_forward_kernel
    globals()["article_grad_query_kernel"] = triton_article_backward.article_grad_query_kernel
    globals()["article_grad_key_kernel"] = triton_article_backward.article_grad_key_kernel
    for function in (article_attention_forward, article_attention_backward):
        triton_op(f"substrate::{function.__name__}", function, mutates_args=())
    operators = torch.ops.substrate
    register_flop_formula(operators.article_attention_forward)(_forward_flops)
    register_flop_formula(operators.article_attention_backward)(_backward_flops)


def _forward_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Those of causal rows, half of the square: what articles save on top is not known from shapes."""
    batch, heads, queries, head_dim = q
    return batch * heads * queries * k[2] * (head_dim + v[3])


def _backward_flops(_grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return _forward_flops(q, k, v) * 5 // 2
