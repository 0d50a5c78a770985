"""The new state of a step's backends: combined over microbatches, head chunks and workers, and written once.

Every part of a step reads the state from before it, so neither the order of the parts nor who computed them matters.
The combination is that of `backends.base.StateSpec.reduce`, elementwise. Many small tensors are handled at a time: a
model has hundreds of ranges, and a kernel for each would cost more than the products of a small one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiled.reduction import Reducer

# Into new memory: two results of a region that are equal may be one tensor.
_MERGE: dict[str, Any] = {
    "min": torch._foreach_minimum,
    "max": torch._foreach_maximum,
    "mean": torch._foreach_add,  # divided by their number at the end
}


class Statistics:
    """What one step's parts return as their new state; `targets` are the model's buffers by full name."""

    def __init__(self, targets: Mapping[str, Tensor]) -> None:
        self.targets = targets
        self._values: dict[str, dict[str, Tensor]] = {kind: {} for kind in _MERGE}
        self._counts: dict[str, int] = {}

    def add(self, entry: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> None:
        """Take the new state from the outputs of one run of a schedule entry, which stay as they are."""
        for kind, merge in _MERGE.items():
            values = self._values[kind]
            names = [local for local, reduce in entry["reduce"].items() if reduce == kind]
            given = {entry["state"][local]: outputs[f"new_{local}"] for local in names}
            known = [full for full in given if full in values]
            merged = merge([values[full] for full in known], [given[full] for full in known]) if known else ()
            values |= given | dict(zip(known, merged, strict=True))
            for full in given:
                self._counts[full] = self._counts.get(full, 0) + 1

    def write(self, reducer: Reducer, applied: Tensor | None = None) -> None:
        """Combine with the other workers and write into the buffers. Every worker has to call it at the same point.

        `applied` (bool, 0-d): unless it is true, the buffers stay as they are.
        """
        if not self._counts:
            return
        least, most, means = (self._values[kind] for kind in ("min", "max", "mean"))
        _over_workers(least, most, means, self._counts, reducer)
        for values in (least, most, means):
            if applied is not None:
                values = {full: torch.where(applied, value, self.targets[full]) for full, value in values.items()}
            if values:
                torch._foreach_copy_([self.targets[full] for full in values], list(values.values()))


def _over_workers(
    least: dict[str, Tensor],
    most: dict[str, Tensor],
    means: dict[str, Tensor],
    counts: Mapping[str, int],
    reducer: Reducer,
) -> None:
    """Replace each value by that of all workers together; for `means`, sums become means."""
    if reducer.is_alone:
        for full, total in means.items():
            if counts[full] > 1:
                total.div_(counts[full])
        return
    # float64 holds every float32 and every count up to 2^53 exactly
    ends = [value.reshape(-1).double() for value in most.values()]
    ends += [value.reshape(-1).double().neg() for value in least.values()]
    if ends:
        reduced = reducer.max_(torch.cat(ends)).split([end.numel() for end in ends])
        for full, end in zip(most, reduced[: len(most)], strict=True):
            most[full] = end.view(most[full].shape).to(most[full].dtype)
        for full, end in zip(least, reduced[len(most) :], strict=True):
            least[full] = end.neg().view(least[full].shape).to(least[full].dtype)
    if means:
        sums = [value.reshape(-1).double() for value in means.values()]
        numbers = [torch.full_like(value, counts[full]) for full, value in zip(means, sums, strict=True)]
        totals = reducer.sum_(torch.stack([torch.cat(sums), torch.cat(numbers)]))
        for (full, value), mean in zip(
            list(means.items()), (totals[0] / totals[1]).split([part.numel() for part in sums]), strict=True
        ):
            means[full] = mean.view(value.shape).to(value.dtype)
