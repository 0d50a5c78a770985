"""One forward of a causal language model on a batch of the trainer's, and the loss it trains on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from backends.precision import as_torch


def logits_of(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[B, S, V] in the policy's dtype of logits."""
    extra = {"article_ids": batch["article_ids"]} if "article_ids" in batch else {}
    logits: Tensor = model(input_ids=batch["input_ids"], use_cache=False, **extra).logits
    return logits.to(as_torch(model.precision.logits))


def loss_of(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Σ grad_scale · CE, as a train step has it (see apps/training/loss.py)."""
    each = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (batch["grad_scale"].flatten() * each).sum()
