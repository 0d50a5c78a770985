"""Steps whose loss or gradients were not finite: how many in a row, and what a run says that ends over them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apps.training.reporting.records import StepRecord


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
