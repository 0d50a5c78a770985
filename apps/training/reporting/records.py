"""What happened in a step and in an evaluation, as plain numbers: printed, written to the CSV and plotted."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step, all its microbatches together."""

    step: int  # from 1, through all epochs
    epoch: int
    loss: float  # cross entropy, mean over the counted positions
    lr: float
    num_tokens: int  # all but padding: prompts, completions and separators
    num_counted: int  # positions trained on
    seconds: float
    grad_norm: float | None  # before clipping; None when gradients are not clipped
    objective: float | None = None  # what was minimised, with label smoothing and z-loss; None when it was the loss
    skipped: int = 0  # 1: loss or gradients were not finite, and nothing was updated

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The loss over the whole dev split after update `step`: Σ losses / counted positions."""

    step: int
    loss: float
    num_counted: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf
