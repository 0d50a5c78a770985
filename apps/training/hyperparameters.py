"""The numbers of one optimizer step as a tensor, one row for each parameter.

They reach the step as a tensor so that one artifact serves every learning rate, decay and clip.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from apps.training.optimizers import Optimizer


def is_decayed(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, not to norms and biases (vectors)."""
    return parameter.ndim >= 2


def hyperparameter_table(
    parameters: Iterable[Tensor], optimizer: type[Optimizer], config: Any, *, step: int, lr: float, dtype: torch.dtype
) -> Tensor:
    """[parameters, hyperparameter_names] on the host, for update `step` (from 1) at rate `lr`.

    Rows follow `model.named_parameters()`; `dtype` is float32, or float64 for float64 parameters.
    """
    rows = {}
    for decayed in (True, False):
        numbers = optimizer.hyperparameters(config, step, lr, decayed)
        rows[decayed] = [numbers[name] for name in optimizer.hyperparameter_names]
    return torch.tensor([rows[is_decayed(parameter)] for parameter in parameters], dtype=dtype)
