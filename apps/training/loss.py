"""Which positions a batch trains on, and the weight each of them has in the loss.

loss = Σ grad_scale · CE with grad_scale = mask / N, N the counted positions of the whole optimizer step: all its
microbatches of all workers. The scale enters the step as a tensor, so a step cut into microbatches has the
gradient of the uncut one, and a batch with nothing to count contributes exactly 0 (a mean would give 0/0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.training.config_schema import TrainingConfig
from apps.training.data.packing import Rows
from apps.training.data.token_types import TokenType
from compiled.objective import DISTILL_TERMS, TERMS


def loss_terms(settings: TrainingConfig) -> dict[str, float]:
    """What is minimised beside cross entropy, by the names of `compiled.objective`; empty: nothing."""
    given = {name: getattr(settings, name) for name in TERMS}
    found = {name: value for name, value in given.items() if value}
    if settings.distill.model_name_or_path is not None:
        found |= dict(zip(DISTILL_TERMS, (settings.distill.weight, settings.distill.temperature), strict=True))
    return found


@dataclass(frozen=True)
class Batch:
    """One microbatch on the host. `labels` is 0 where `mask` is false; `num_tokens` counts all but padding."""

    input_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S]
    mask: Tensor  # bool [B, S]: the positions that count
    article_ids: Tensor | None  # int32 [B, S], or None without article attention
    num_counted: int
    num_tokens: int


def make_batch(rows: Rows, *, article_attention: bool = False) -> Batch:
    """The batch of packed `rows`.

    A position counts iff the type of its target (the token to its right) is not padding, and the token it starts from
    is no article separator: the next article's first token cannot be told from this one's last. Prompt, completion and
    separator targets count alike.
    """
    types = rows.token_type_ids
    mask = counted_positions(types)
    labels = np.zeros(types.shape, dtype=np.int64)
    labels[:, :-1] = rows.input_ids[:, 1:]
    labels[~mask] = 0  # a valid id for gather; its weight is 0
    return Batch(
        input_ids=torch.from_numpy(rows.input_ids.astype(np.int64)),
        labels=torch.from_numpy(labels),
        mask=torch.from_numpy(mask),
        article_ids=torch.from_numpy(article_ids(types)) if article_attention else None,
        num_counted=int(mask.sum()),
        num_tokens=int((types != TokenType.PADDING).sum()),
    )


def counted_positions(types: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool [B, S]: the positions whose prediction is trained on. The last one has no target and never counts."""
    counted = np.zeros(types.shape, dtype=np.bool_)
    counted[:, :-1] = (types[:, 1:] != TokenType.PADDING) & (types[:, :-1] != TokenType.SEPARATOR)
    return counted


def article_ids(types: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """int32 [B, S]: 1, 2, 3 … for the articles of each sequence, 0 for padding.

    A separator belongs to the article it ends. Prompt and completion of one article share its id. Padding ends an
    article as well (a truncated one has no separator).
    """
    is_text = types != TokenType.PADDING
    starts = is_text.copy()
    starts[:, 1:] &= (types[:, :-1] == TokenType.SEPARATOR) | (types[:, :-1] == TokenType.PADDING)
    return np.where(is_text, np.cumsum(starts, axis=1), 0).astype(np.int32)


def microbatches(
    batches: Sequence[Batch],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    num_counted: int | None = None,
    first_rows: Sequence[int] | None = None,
) -> list[dict[str, Tensor]]:
    """The tensors a program takes for one optimizer step, on `device`: input_ids, labels, grad_scale[, article_ids].

    `num_counted` is N, by default the counted positions of `batches`; with N = 0 every grad_scale is 0. `dtype` is
    grad_scale's: float32, or float64 when the logits are. `first_rows`: the number of each batch's first row within the
    rows of the step; by default they follow one another. Copies to a GPU do not make the host wait.
    """
    total = sum(batch.num_counted for batch in batches) if num_counted is None else num_counted
    if first_rows is None:
        first_rows = [0, *accumulate(len(batch.input_ids) for batch in batches[:-1])]
    return [
        _on_device(batch, first_row, total, torch.device(device), dtype)
        for batch, first_row in zip(batches, first_rows, strict=True)
    ]


def _on_device(batch: Batch, first_row: int, total: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {
        "input_ids": batch.input_ids,
        "labels": batch.labels,
        "grad_scale": batch.mask.to(dtype) / max(total, 1),
        "first_row": torch.tensor(first_row),
    }
    if batch.article_ids is not None:
        tensors["article_ids"] = batch.article_ids
    if device.type == "cuda":  # a copy from pageable memory would block the host until the device is done
        tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
