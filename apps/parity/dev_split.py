"""The whole model on held-out text: how likely each variant finds it, and how far its predictions are from the
reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apps.parity.forward import logits_of, loss_of
from apps.training.reporting.records import Evaluation

_POSITIONS = 256  # whose predictions are compared at a time


@dataclass(frozen=True)
class DevNumbers:
    """Both models' loss over the same counted positions, and the mean of KL(reference ‖ other) over them, in nats."""

    reference: Evaluation
    other: Evaluation
    kl: float


def compare_on(
    reference: Any, other: Any, batches: Iterable[tuple[Mapping[str, Tensor], int]], on_batch: Callable[[], object]
) -> DevNumbers:
    """Over `batches`: (tensors as a train step takes them, counted positions). Every position weighs the same, as in
    a run's own evaluation: its loss is a batch's sum over positions, divided by all positions in the end."""
    sums: Tensor | None = None
    counted = 0
    for batch, num_counted in batches:
        with torch.no_grad():
            ours, theirs = logits_of(reference, batch), logits_of(other, batch)
            losses = [loss_of(logits, batch).double() * num_counted for logits in (ours, theirs)]
            added = torch.stack([*losses, _divergence(ours, theirs, batch["grad_scale"] > 0)])
        sums = added if sums is None else sums + added
        counted += num_counted
        on_batch()
    assert sums is not None, "no batch to compare on"
    expected, found, divergence = (sums / max(counted, 1)).tolist()
    return DevNumbers(Evaluation(0, expected, counted), Evaluation(0, found, counted), divergence)


def _divergence(reference: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """Σ KL(softmax reference ‖ softmax other) over the positions of `mask`; logits [B, S, V], mask [B, S]; float64.

    A few positions at a time: float64 logits of a large vocabulary would be the largest tensors of all.
    """
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    chunks = (tensor.flatten(0, 1).split(_POSITIONS) for tensor in (reference, other, mask))
    for ours, theirs, counts in zip(*chunks, strict=True):
        log_p, log_q = (F.log_softmax(logits.double(), -1) for logits in (ours, theirs))
        total += ((log_p.exp() * (log_p - log_q)).sum(-1) * counts).sum()
    return total
