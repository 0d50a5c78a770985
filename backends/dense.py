"""The reference: the products exactly as PyTorch computes them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, State


class Dense(Backend):
    """F.linear and scaled_dot_product_attention; bit-identical to Hugging Face with attn_implementation="sdpa"."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        return F.linear(x, weight, bias), state

    def matmul(self, a: Tensor, b: Tensor, state: State, *, training: bool = False) -> tuple[Tensor, State]:
        return a @ b, state

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        state: State,
        training: bool = False,
    ) -> tuple[Tensor, State]:
        queries, heads, groups = q.shape[2], q.shape[1], k.shape[1]
        is_causal = is_causal and mask is None and queries > 1
        if is_causal and k.shape[2] > queries:
            # The tail of a preallocated cache is still empty, and flash kernels want as many keys as queries.
            k, v = k[:, :, :queries], v[:, :, :queries]
        # With a mask, the fused CUDA kernels do not take grouped heads and a slow fallback would run: repeat k and v.
        grouped = groups != heads and mask is None and k.shape[-1] == v.shape[-1] <= 256
        if groups != heads and not grouped:
            k, v = _repeat_heads(k, heads // groups), _repeat_heads(v, heads // groups)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return out, state


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    """[B, groups, S, d] → [B, groups · times, S, d], as Hugging Face's repeat_kv."""
    batch, groups, length, head_dim = x.shape
    return x[:, :, None].expand(batch, groups, times, length, head_dim).reshape(batch, groups * times, length, head_dim)
