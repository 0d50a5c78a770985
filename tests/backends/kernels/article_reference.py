"""Attention with a dense mask, from its definition."""

import torch
from torch import Tensor


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """out [B, H, S, D] for q [B, H, S, D], k and v [B, G, S, D], mask bool [B, 1, S, S]."""
    times = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(times, 1).mT * scale
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.repeat_interleave(times, 1)
