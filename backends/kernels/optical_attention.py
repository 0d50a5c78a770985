"""Optical attention: both products through converters, the softmax between them in at least float32.

    S = Q(q̂ k̂ᵀ; scores range, ξ)     unscaled, its range observed over the pairs that may attend only
    P = softmax(S · scale)             0 where masked
    out = Q(P̂ v̂; out range, ξ)        P̂ = Q(P; [0, 1]); k̂ᵀ and v̂ have the smallest magnitude of second operands

The backward is that of softmax(· scale) and of the two products at the tensors as they came in:

    dP = dO Vᵀ,  dV = Pᵀ dO,  dS = P ∘ (dP − Σ P ∘ dP) · scale,  dQ = dS K,  dK = dSᵀ Q

with P the softmax of the *quantised* scores. It is computed again from q and k, with the same random numbers, so
nothing of the size of the scores is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.kernels.optical_linear import runs_in_half
from backends.kernels.optical_product import (
    LEFT,
    RIGHT,
    SCORES,
    VALUES,
    Converters,
    Operands,
    Place,
    convert,
    detect,
    dither_key,
    see,
)
from backends.kernels.quantise import Range, split_ranges, wide_dtype


def optical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    ranges: tuple[Tensor, ...],
    step: Tensor,
    first_row: Tensor,
    converters: Converters,
    *,
    observe: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out [B, H, S, D] for q [B, H, S, D], k and v [B, G, S_kv, D], and the ranges seen, float32 0-d.

    `mask` bool, True = attend, broadcast to [B, 1, S, S_kv]; without it `is_causal` lets query i see keys 0…i (a single
    query sees all). `ranges` (before the step) and what is seen: min and max of q, k, v, scores, out. `step` and
    `first_row` as for `optical_linear`. Without `observe` nothing is seen. The one place where an implementation for a
    device is chosen.
    """
    if _has_kernels(q, v, converters):
        from backends.kernels.optical_attention_cuda import attention_with_kernels

        of_scores, of_out = (dither_key(converters, Place(step, first_row, product)) for product in (SCORES, VALUES))
        levels = (converters.input_levels, converters.output_levels)
        lut_min = converters.lut_min
        return attention_with_kernels(
            q, k, v, mask, scale, is_causal, ranges, (of_scores, of_out), first_row, levels, lut_min, observe=observe
        )
    if mask is None and is_causal and q.shape[2] > 1:
        rows, columns = (torch.arange(length, device=q.device) for length in (q.shape[2], k.shape[2]))
        mask = rows[:, None] >= columns
    out, *seen = _OpticalAttention.apply(
        q, k, v, mask, scale, torch.stack(ranges), step, first_row, converters, observe
    )
    return out, tuple(seen)


class _OpticalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        ranges: Tensor,
        step: Tensor,
        first_row: Tensor,
        converters: Converters,
        observe: bool,
    ) -> tuple[Tensor, ...]:
        place, wide = Place(step, first_row, VALUES), wide_dtype(q.dtype)
        _, _, v_range, _, out_range = split_ranges(ranges)
        weights, scores_seen = _weights(q, k, mask, scale, ranges, step, first_row, converters, observe)
        probability_range = Range(torch.zeros_like(v_range.low), torch.ones_like(v_range.low))
        left = convert(_grouped(weights, k), probability_range, converters, second=False)
        right = convert(v.to(wide), v_range, converters, second=True)
        operands, shape = Operands(left, right, probability_range, v_range), (*q.shape[:-1], v.shape[-1])
        out, out_seen = detect(operands, shape, out_range, converters, place, half=runs_in_half(q), observe=observe)
        if not observe:
            return (out.to(q.dtype),)
        operands_seen = (
            *see(q, converters, place._replace(product=SCORES), LEFT),
            *see(k, converters, place._replace(product=SCORES), RIGHT),
            *see(v, converters, place, RIGHT),
        )
        return out.to(q.dtype), *operands_seen, *scores_seen, *out_seen

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, mask, ctx.scale, ranges, step, first_row, ctx.converters, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, v, mask, ranges, step, first_row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        q, k, v, mask, ranges, step, first_row = ctx.saved_tensors
        weights, _ = _weights(q, k, mask, ctx.scale, ranges, step, first_row, ctx.converters, False)
        grad_out, rows = _grouped(grad, k), _grouped(q, k)
        p = _grouped(weights, k)
        grad_v = p.to(grad.dtype).mT @ grad_out
        grad_p = (grad_out @ v.mT).to(p.dtype)
        grad_scores = (p * (grad_p - (p * grad_p).sum(-1, keepdim=True)) * ctx.scale).to(q.dtype)
        grad_q = (grad_scores @ k).view(q.shape)
        grad_k = grad_scores.mT @ rows
        return (grad_q, grad_k, grad_v, *(None for _ in ctx.needs_input_grad[3:]))


def _weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    ranges: Tensor,
    step: Tensor,
    first_row: Tensor,
    converters: Converters,
    observe: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """P [B, H, S, S_kv] in float32 or float64, and the range of the scores."""
    q_range, k_range, _, scores_range, _ = split_ranges(ranges)
    wide = wide_dtype(q.dtype)
    left = convert(_grouped(q, k).to(wide), q_range, converters, second=False)
    right = convert(k.to(wide), k_range, converters, second=True).mT
    scores, seen = detect(
        Operands(left, right, q_range, k_range),
        (*q.shape[:-1], k.shape[2]),
        scores_range,
        converters,
        Place(step, first_row, SCORES),
        half=runs_in_half(q),
        attended=mask,
        observe=observe,
    )
    if mask is None:
        return (scores * scale).softmax(-1), seen
    scores = torch.where(mask, scores * scale, torch.finfo(wide).min)
    return torch.where(mask, scores.softmax(-1), 0.0), seen


def _has_kernels(q: Tensor, v: Tensor, converters: Converters) -> bool:
    """Whether the Triton kernels compute this: 16-bit on a GPU, ranges by extremes, no shot noise."""
    plain = converters.quantiles is None and converters.photons_per_mac is None
    return runs_in_half(q) and q.shape[-1] == v.shape[-1] and q.shape[-1] in (16, 32, 64, 128) and plain


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """[B, H, S, ·] → [B, G, H/G · S, ·]: the heads that share a key head become more rows of one product."""
    batch, heads, queries, last = x.shape
    groups = k.shape[1]
    return x.reshape(batch, groups, heads // groups * queries, last)
