"""The reference: the products exactly as PyTorch computes them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, State
from backends.kernels.article_attention import article_attention, has_article_kernels


class Dense(Backend):
    """F.linear and scaled_dot_product_attention; bit-identical to Hugging Face with attn_implementation="sdpa".

    One exception: training in bfloat16 on a CPU with short sequences takes two products and a float32 softmax.
    """

    joins_rows: ClassVar[bool] = True
    source_modules: ClassVar[tuple[str, ...]] = (
        "backends.articles",
        "backends.kernels.article_attention",
        "backends.kernels.triton_article_backward",
        "backends.kernels.triton_article_forward",
    )

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        return F.linear(x, weight, bias), state

    def matmul(self, a: Tensor, b: Tensor, state: State, *, training: bool = False) -> tuple[Tensor, State]:
        return a @ b, state

    def drops_attention(self) -> bool:
        return True

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
        if training and _composed_is_faster(q, k):
            return self.attention_of_products(q, k, v, mask=mask, scale=scale, is_causal=is_causal, state=state)
        queries, heads, groups = q.shape[2], q.shape[1], k.shape[1]
        is_causal = is_causal and mask is None and queries > 1
        if is_causal and k.shape[2] > queries:
            # The tail of a preallocated cache is still empty, and flash kernels want as many keys as queries.
            k, v = k[:, :, :queries], v[:, :, :queries]
        if mask is not None and queries == 1 and mask.shape[1] == 1:
            # A token from a preallocated cache: heads that share a key head are as good as queries that do.
            rows = q.reshape(q.shape[0], groups, heads // groups, q.shape[-1])
            out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
            return out.reshape(*q.shape[:-1], v.shape[-1]), state
        # With a mask, the fused CUDA kernels do not take grouped heads and a slow fallback would run: repeat k and v.
        grouped = groups != heads and mask is None and k.shape[-1] == v.shape[-1] <= 256
        if groups != heads and not grouped:
            k, v = _repeat_heads(k, heads // groups), _repeat_heads(v, heads // groups)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
        return out, state

    def article_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        articles: Tensor,
        scale: float,
        state: State,
        training: bool = False,
    ) -> tuple[Tensor, State]:
        if has_article_kernels(q, k, v, scale):
            return article_attention(q, k, v, articles, scale), state
        return super().article_attention(q, k, v, articles=articles, scale=scale, state=state, training=training)


def _composed_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether two oneDNN products and a softmax beat the flash kernel, whose tiles are small products without AVX-512.

    On two EPYC cores, a block's forward and backward in ms, composed and flash: 21.1 and 27.2 at 4x256 tokens,
    45.2 and 39.3 at 1x1024, 190 and 95 at 1x2048.
    """
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < k.shape[2] <= 512


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    """[B, groups, S, d] → [B, groups · times, S, d], as Hugging Face's repeat_kv."""
    batch, groups, length, head_dim = x.shape
    return x[:, :, None].expand(batch, groups, times, length, head_dim).reshape(batch, groups * times, length, head_dim)
