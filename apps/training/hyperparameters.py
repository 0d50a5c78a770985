"""The numbers of one optimizer step as a tensor, one row for each parameter.

They reach the step as a tensor so that one artifact serves every learning rate, decay and clip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from apps.training.parameter_groups import ParameterGroup
from backends.stochastic_rounding import key_columns


def hyperparameter_table(
    names: Iterable[str],
    groups: Sequence[ParameterGroup],
    *,
    step: int,
    rate: Callable[[float], float],
    dtype: torch.dtype,
    rounding_seed: int | None = None,
) -> Tensor:
    """[parameters, numbers of the rule that has most] on the host, for update `step` (from 1).

    With a `rounding_seed` the last columns are the keys of stochastic rounding.

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
    table = [rows.get(name, [0.0] * width) for name in names]
    if rounding_seed is not None:
        table = [row + key_columns(rounding_seed, step, number) for number, row in enumerate(table)]
    return torch.tensor(table, dtype=dtype)
