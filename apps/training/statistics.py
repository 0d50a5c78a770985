"""The statistics of measured steps as numbers with names: by group of parameters, with running sums, shares of time.

    param_l1/all  grad_l2/layers.0  update_linf/lm_head  grad_nonfinite/all      norms and counts of a group
    dot_last_grad/all  cos_last_grad/all  dot_last_update/all  cos_last_update/all
    sum_dot_last_grad/all …      running sums of the four above over the measured steps of the whole run
    loss_change  sum_loss_change  accuracy  seconds/forward  share/forward

g is the gradient before clipping by norm, the update x_{n+1} − x_n; "last" means the step right before this one,
measured or not. Where there is none (the first step) its products are left out. A sum leaves out what is not finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from apps.training.config_schema import TrainConfig
from apps.training.host_copy import HostCopy
from apps.training.reporting.records import StepRecord
from apps.training.step_plan import StepPlan
from compiled.measuring import COLUMNS, KINDS, Measuring

if TYPE_CHECKING:
    from apps.training.checkpointing.saving import Resumed

ALL = "all"
_PART = re.compile(r"^(?:model\.)?(.*?\.\d+)\.")  # up to the number of a block


@dataclass(frozen=True)
class MeasuredStep:
    """A measured step, whose numbers may still be on their way: the table [parameters, COLUMNS], accuracy, time."""

    table: HostCopy
    accuracy: HostCopy
    phases: Callable[[], Mapping[str, float]]
    reading: float  # seconds it took to read the rows


@dataclass
class RunStatistics:
    """Turns measured steps into named numbers; `latest` holds the last ones. `sums` go into checkpoints and come back.

    `groups`: the rows of the table that belong to each group. `last_loss`: that of the step before those to come.
    """

    measuring: Measuring
    groups: Mapping[str, Sequence[int]]
    last_loss: float | None = None
    sums: dict[str, float] = field(default_factory=dict)
    latest: tuple[int, dict[str, float]] = (0, {})

    def begin(self, step: int) -> None:
        """The device is about to be given `step`."""
        self.measuring.begin(step)

    def copy(self, reading: float) -> MeasuredStep | None:
        """It has been given the step: fetch its numbers if it is measured, before a later one replaces them."""
        measuring = self.measuring
        if not measuring.measures:
            return None
        return MeasuredStep(HostCopy(measuring.table), HostCopy(measuring.accuracy), measuring.phases.seconds, reading)

    def tell(self, record: StepRecord, measured: MeasuredStep | None) -> None:
        """A step was taken, and perhaps measured."""
        last_loss, self.last_loss = self.last_loss, record.loss
        if measured is None:
            return
        table, values = measured.table.read(), {"accuracy": measured.accuracy.read().item()}
        summed: dict[str, float] = {}
        if last_loss is not None:
            summed["loss_change"] = record.loss - last_loss
        for name, rows in self.groups.items():
            norms, products = _of_group(table[list(rows)])
            values |= {f"{key}/{name}": value for key, value in norms.items()}
            summed |= {f"{key}/{name}": value for key, value in products.items()}
        for key, value in summed.items():
            self.sums[f"sum_{key}"] = self.sums.get(f"sum_{key}", 0.0) + (value if math.isfinite(value) else 0.0)
        values |= summed | {f"sum_{key}": self.sums[f"sum_{key}"] for key in summed}
        phases = {"data": measured.reading, **measured.phases()}
        phases["other"] = max(record.seconds - sum(phases.values()), 0.0)
        for phase, seconds in phases.items():
            values |= {f"seconds/{phase}": seconds, f"share/{phase}": seconds / record.seconds}
        self.latest = (record.step, values)

    def values_of(self, step: int) -> dict[str, float]:
        """The numbers of step `step`, if it was the last one measured."""
        return self.latest[1] if self.latest[0] == step else {}


def make_statistics(config: TrainConfig, plan: StepPlan, program: Any, resumed: Resumed) -> RunStatistics | None:
    """The statistics that the settings ask for, going on where the resumed run was."""
    if config.logging.stats_every is None:
        return None
    names = program.measuring.names
    if config.logging.stats_by == "group":
        labels = {name: f"{number}-{group.name}" for number, group in enumerate(plan.groups) for name in group.shapes}
    else:
        labels = {name: part_of(name) if config.logging.stats_by == "part" else name for name in names}
    last_loss = resumed.records[-1].loss if resumed.records else None
    return RunStatistics(program.measuring, rows_by([labels[name] for name in names]), last_loss, resumed.sums)


def rows_by(labels: Sequence[str]) -> dict[str, list[int]]:
    """Group → its rows, for parameters with these labels; the group of all comes first."""
    groups: dict[str, list[int]] = {ALL: list(range(len(labels)))}
    for row, label in enumerate(labels):
        groups.setdefault(label, []).append(row)
    return groups


def part_of(name: str) -> str:
    """The block a parameter lies in (`layers.3`), or the module it belongs to (`embed_tokens`, `norm`, `lm_head`)."""
    block = _PART.match(name)
    return block.group(1) if block else name.removeprefix("model.").rpartition(".")[0] or name


def _of_group(rows: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Norms and counts, and the products with the last step's gradient and update, of some rows of the table."""
    sums = dict(zip(COLUMNS, rows.sum(0).tolist(), strict=True))
    largest = dict(zip(COLUMNS, torch.amax(rows, 0).tolist(), strict=True))
    norms = {}
    for kind in KINDS:
        norms[f"{kind}_l1"] = sums[f"{kind}_l1"]
        norms[f"{kind}_l2"] = math.sqrt(sums[f"{kind}_square"])
        norms[f"{kind}_linf"] = largest[f"{kind}_max"]
    products = {}
    for last in ("last_grad", "last_update"):
        length = math.sqrt(sums[f"{last}_square"])
        if length != 0:
            products[f"dot_{last}"] = sums[f"dot_{last}"]
            both = norms["grad_l2"] * length
            products[f"cos_{last}"] = sums[f"dot_{last}"] / both if both else math.nan
    return norms | {"grad_nonfinite": sums["nonfinite"]}, products
