"""Between the gradients' sum and the update: clipping by value and by global norm, and whether the update takes place.

Everything is decided on the device, from numbers that are the same on every worker.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compiled.reduction import Gradients
from compiled.updating import Updater


@dataclass(frozen=True)
class Verdict:
    """What becomes of a step's gradients: their norm as they came (0-d), the factor that the update takes them by, and
    whether it takes place (None: it always does)."""

    norm: Tensor | None
    coefficient: Tensor
    applied: Tensor | None


def clip_values(gradients: Gradients, bound: float | None) -> None:
    """Bring every element into [−bound, bound], in place, the bound rounded to their dtype; NaN stays NaN."""
    tensors = list(gradients.values())
    if bound is not None and tensors:
        torch._foreach_clamp_max_(tensors, bound)
        torch._foreach_clamp_min_(tensors, -bound)


def judge(
    updater: Updater,
    gathered: Iterable[Gradients],
    *,
    max_norm: float | Tensor | None,
    max_value: float | None,
    loss: Tensor | None,
) -> Verdict:
    """Clip all gradients by value, then find the factor that clips them by norm.

    `loss`: of all workers, where an update is to be skipped unless it and every gradient are finite; the factor is then
    NaN, which the update's region takes as the word to leave everything as it is.
    """
    groups = list(gathered)
    norm = updater.norm(groups)
    bounded = norm
    if max_value is not None:
        for gradients in groups:
            clip_values(gradients, max_value)
        bounded = norm if max_norm is None else updater.norm(groups)
    coefficient = updater.one if max_norm is None else updater.clip(bounded, max_norm)
    if loss is None:
        return Verdict(norm, coefficient, None)
    applied = torch.isfinite(loss).all() & torch.isfinite(norm)
    return Verdict(norm, torch.where(applied, coefficient, math.nan), applied)
