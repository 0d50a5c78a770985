"""The numbers of one optimizer step as a tensor, one row for each parameter.

They reach the step as a tensor so that one artifact serves every learning rate, decay and clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from apps.training.parameter_groups import ParameterGroup


def hyperparameter_table(
    names: Iterable[str],
    groups: Sequence[ParameterGroup],
    *,
    step: int,
    rate: Callable[[float], float],
    dtype: torch.dtype,
) -> Tensor:
    """[parameters, numbers of the rule that has most] on the host, for update `step` (from 1).

    Rows follow `names`, those of `model.named_parameters()`; a row's first columns are its rule's
    `hyperparameter_names`, the others zero, as is the row of a frozen parameter. `rate`: the schedule's rate of this
    step for a peak. `dtype` is float32, or float64 for float64 parameters.
    """
    width = max((len(group.rule.hyperparameter_names) for group in groups), default=0)
    rows: dict[str, list[float]] = {}
    for group in groups:
        numbers = group.numbers(step, rate(group.settings.lr))
        row = [numbers[name] for name in group.rule.hyperparameter_names]
        rows |= dict.fromkeys(group.shapes, row + [0.0] * (width - len(row)))
    return torch.tensor([rows.get(name, [0.0] * width) for name in names], dtype=dtype).view(-1, width)
