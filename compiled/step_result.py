"""What a step gives back."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """0-d tensors: Σ grad_scale · CE over microbatches and workers, and the gradients' global norm before clipping.

    The norm is None when gradients are not clipped. `objective`: the same sum of what was minimised, None for the loss.
    `applied` (bool): whether anything was updated, None for a step that cannot skip its update.
    """

    loss: Tensor
    grad_norm: Tensor | None
    objective: Tensor | None = None
    applied: Tensor | None = None
