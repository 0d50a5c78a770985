"""Articles of a packed row: a token attends to its own article, up to itself. An article is a run of equal ids."""

from __future__ import annotations

import torch
from torch import Tensor


def article_spans(article_ids: Tensor) -> Tensor:
    """article_ids [B, S] → int32 [2, B, S]: the first token of each token's article, and one past its last."""
    length = article_ids.shape[1]
    positions = torch.arange(length, dtype=torch.int32, device=article_ids.device)
    turns = article_ids[:, 1:] != article_ids[:, :-1]
    edge = torch.ones_like(article_ids[:, :1], dtype=torch.bool)
    opens, closes = torch.cat((edge, turns), 1), torch.cat((turns, edge), 1)
    starts = torch.where(opens, positions, 0).cummax(1).values
    ends = torch.where(closes, positions + 1, length).flip(1).cummin(1).values.flip(1)
    return torch.stack((starts, ends)).to(torch.int32)


def mask_of_spans(spans: Tensor) -> Tensor:
    """int32 [2, B, S] → bool [B, 1, S, S], True where the key is in the query's article and not after it."""
    starts, positions = spans[0], torch.arange(spans.shape[-1], dtype=torch.int32, device=spans.device)
    return ((positions >= starts[:, :, None]) & (positions <= positions[:, None]))[:, None]


def article_mask(article_ids: Tensor) -> Tensor:
    """article_ids [B, S] → bool [B, 1, S, S], True where the key is in the query's article and not after it."""
    return mask_of_spans(article_spans(article_ids))
