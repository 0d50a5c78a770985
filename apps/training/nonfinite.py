"""Steps whose loss or gradients were not finite: the first, or how many in a row, and what a run then says."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from apps.training.reporting.records import StepRecord


class NonFiniteLoss(RuntimeError):
    """A step's loss, or what is known of its gradient, is NaN or infinite: the weights are spoilt for good."""


def require_finite(record: StepRecord, *, bounds_values: bool) -> None:
    """Raises NonFiniteLoss, unless the step left everything as it was.

    A gradient may be spoilt where the loss is not yet: the weights behind that step must not be saved. `bounds_values`:
    each gradient is clipped, which makes an infinite one a number again.
    """
    named = {"loss": record.loss, "objective": record.objective, "gradient norm": record.grad_norm}
    if bounds_values and record.grad_norm == math.inf:
        del named["gradient norm"]
    for what, value in named.items():
        if value is not None and not math.isfinite(value) and not record.skipped:
            raise NonFiniteLoss(
                f"The {what} of step {record.step} is {value} at learning rate {record.lr:.4g}; it was not saved. "
                "Lower optimizer.lr, raise schedule.warmup_steps, or set training.max_grad_norm."
            )


def are_finite(model: nn.Module) -> Tensor:
    """Whether every trained weight is a finite number, 0-d; each is read once, and no device waited for."""
    weights = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    largest = torch._foreach_norm(weights, torch.inf)  # NaN where one is
    return torch.stack([each.double() for each in largest]).isfinite().all()


def spoilt_weights(step: int) -> str:
    """What is said of weights that `are_finite` denies: nothing else looked at the gradients."""
    return (
        f"The weights behind step {step} hold NaN or infinity, though its loss was finite: a gradient was not. They "
        "were not saved. Set training.max_grad_norm, which sees it at once, or training.max_nonfinite_steps to skip "
        "such updates."
    )


def skipped_in_a_row(records: Sequence[StepRecord]) -> int:
    """How many of the last steps were skipped, without one between them that was not."""
    return next((index for index, record in enumerate(reversed(records)) if not record.skipped), len(records))


def ended_over_skipped(records: Sequence[StepRecord], most: int, *, tell: bool) -> bool:
    """Whether the last `most` steps (0: none can be) were all skipped; with `tell`, says so on the error stream."""
    count = skipped_in_a_row(records)
    if not 0 < most <= count:
        return False
    if tell:
        last = records[-1]
        print(
            f"error: The loss or a gradient was NaN or infinite in {count} steps in a row, up to step {last.step} at "
            f"learning rate {last.lr:.4g}. Their updates were skipped, and the weights before them saved. Lower "
            "optimizer.lr, raise schedule.warmup_steps, or allow more with training.max_nonfinite_steps.",
            file=sys.stderr,
            flush=True,
        )
    return True
