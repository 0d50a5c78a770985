"""What is told of a step beside its loss: norms of parameters, gradients and updates, how the gradient lies to the last
step's gradient and update, accuracy, and where the time goes.

All of it is computed on the device between the gradients and the update of each group, in the steps that are measured;
nothing waits for the host. The table has a row for each parameter, and groups are formed by who reads it.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from compiled.phases import Phases
from compiled.reduction import Reducer

KINDS = ("param", "grad", "update")  # before the update; before clipping; after − before
NORMS = {"l1": 1.0, "square": 2.0, "max": float("inf")}
DOTS = ("dot_last_grad", "last_grad_square", "dot_last_update", "last_update_square")
COLUMNS = (*(f"{kind}_{norm}" for kind in KINDS for norm in NORMS), "nonfinite", *DOTS)


class Mode(enum.Enum):
    """What a step is asked for: nothing, to keep its gradient and update for the next one, or to be measured."""

    OFF = 0
    KEEP = 1
    MEASURE = 2


class Unmeasured:
    """A run without statistics: what a step calls, and nothing is done."""

    mode = Mode.OFF
    measures = False  # this step

    def __init__(self) -> None:
        self.phases = Phases(torch.device("cpu"))

    def begin(self, step: int) -> None:
        """Told by the trainer which step comes, before each; they are consecutive."""

    def start(self) -> None:
        """The step begins."""

    def enter(self, phase: str) -> None:
        """From here on the time belongs to `phase`."""

    def before_update(self, gradients: Mapping[str, Tensor]) -> None:
        """Before parameters are updated together: their gradients, summed and not clipped."""

    def after_update(self, names: Iterable[str]) -> None:
        """Behind it, with the same names."""

    def count_hits(self, accuracy: Tensor) -> None:
        """Add a part's Σ grad_scale over the positions whose likeliest token is the label, 0-d."""

    def finish(self, reducer: Reducer) -> None:
        """The step ends: sum over the workers, which have to call it at the same point."""

    def state(self) -> dict[str, Tensor]:
        """What the next step needs of the last one, as `<parameter>.last_gradient`, `.last_update`: the live tensors.

        Nothing behind a step whose successor is not measured.
        """
        return {}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, from any number of workers; without it the next step has no last one."""


class Measuring(Unmeasured):
    """Measures the steps whose number `every` divides. `names`: all parameters that are trained, in order.

    `weights`: the numbers that this worker updates in place, by full name. It keeps the last gradient and the last
    update of those, in at least float32. Behind a measured step, until the next one: `table` [names, COLUMNS] float64,
    the same on every worker, and `accuracy` 0-d.
    """

    def __init__(self, names: Sequence[str], weights: Mapping[str, Tensor], every: int, device: torch.device) -> None:
        self.names, self.every = tuple(names), every
        self.weights = weights
        self.last_gradient = {name: _wide_zeros(weight) for name, weight in self.weights.items()}
        self.last_update = {name: _wide_zeros(weight) for name, weight in self.weights.items()}
        self.table = torch.zeros(len(names), len(COLUMNS), dtype=torch.float64, device=device)
        self.accuracy = torch.zeros((), dtype=torch.float64, device=device)
        self.phases = Phases(device)
        self._is_kept = False  # what the step before this one left is there
        self._rows: dict[str, Tensor] = {}

    @property
    def measures(self) -> bool:  # type: ignore[override]
        return self.mode is Mode.MEASURE

    def begin(self, step: int) -> None:
        measured, followed = step % self.every == 0, (step + 1) % self.every == 0
        self.mode = Mode.MEASURE if measured else Mode.KEEP if followed else Mode.OFF
        if measured and not self._is_kept and self.weights:
            torch._foreach_zero_([*self.last_gradient.values(), *self.last_update.values()])
        self._is_kept = self.mode is not Mode.OFF

    def start(self) -> None:
        if self.measures:
            self.table.zero_()
            self.accuracy.zero_()
            self.phases.start()

    def enter(self, phase: str) -> None:
        if self.measures:
            self.phases.enter(phase)

    @torch.no_grad()
    def before_update(self, gradients: Mapping[str, Tensor]) -> None:
        names = list(gradients)
        if self.mode is Mode.OFF or not names:
            return
        self.enter("statistics")
        values, found = [self.weights[name] for name in names], [gradients[name] for name in names]
        last_gradients = [self.last_gradient[name] for name in names]
        last_updates = [self.last_update[name] for name in names]
        if self.measures:
            wide = [gradient.to(last.dtype) for gradient, last in zip(found, last_gradients, strict=True)]
            pairs = [(wide, last_gradients), (last_gradients,) * 2, (wide, last_updates), (last_updates,) * 2]
            self._write(names, "param_l1", _norms(values))
            self._write(names, "grad_l1", _norms(found))
            self._write(names, "nonfinite", [torch.stack([(~torch.isfinite(each)).sum() for each in found])])
            self._write(names, DOTS[0], [_dots(*pair) for pair in pairs])
        torch._foreach_copy_(last_gradients, found)
        torch._foreach_copy_(last_updates, values)
        self.enter("update")

    @torch.no_grad()
    def after_update(self, names: Iterable[str]) -> None:
        names = list(names)
        if self.mode is Mode.OFF or not names:
            return
        self.enter("statistics")
        updates = [self.last_update[name] for name in names]
        torch._foreach_neg_(updates)
        torch._foreach_add_(updates, [self.weights[name] for name in names])
        if self.measures:
            self._write(names, "update_l1", _norms(updates))
        self.enter("reduce")

    def count_hits(self, accuracy: Tensor) -> None:
        self.accuracy += accuracy

    def finish(self, reducer: Reducer) -> None:
        if not self.measures:
            return
        reducer.sum_(self.accuracy)
        if reducer.shards:
            reducer.sum_(self.table)
        self.phases.finish()

    def state(self) -> dict[str, Tensor]:
        return {} if self.mode is Mode.OFF else self._kept()

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        places = self._kept()
        self._is_kept = all(key in tensors for key in places)
        if self._is_kept:
            for key, target in places.items():
                target.copy_(tensors[key])

    def _kept(self) -> dict[str, Tensor]:
        kinds = {"last_gradient": self.last_gradient, "last_update": self.last_update}
        return {f"{name}.{kind}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}

    def _write(self, names: Sequence[str], first: str, columns: Sequence[Tensor]) -> None:
        """Columns of these parameters' rows, from column `first` on."""
        if names[0] not in self._rows:  # a recording of the step must not copy from the host
            self._rows[names[0]] = torch.tensor([self.names.index(name) for name in names], device=self.table.device)
        values = torch.stack([column.double() for column in columns], 1)
        start = COLUMNS.index(first)
        self.table[:, start : start + len(columns)].index_copy_(0, self._rows[names[0]], values)


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """l1, squared l2 and l∞ of each, in at least float32."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    found = [torch.stack(torch._foreach_norm(list(tensors), order, dtype=dtype)).double() for order in NORMS.values()]
    return [found[0], found[1].square(), found[2]]


def _dots(ones: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(ones, others, strict=True)])


def _wide_zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32), device=tensor.device)
