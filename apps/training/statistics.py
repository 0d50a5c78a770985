"""The statistics of measured steps as numbers with names: by group of parameters, with running sums, shares of time.

    param_l1/all  grad_l2/layers.0  update_linf/lm_head  grad_nonfinite/all      norms and counts of a group
    dot_last_grad/all  cos_last_grad/all  dot_last_update/all  cos_last_update/all
    sum_dot_last_grad/all …      running sums of the four above over the measured steps of the whole run
    loss_change  sum_loss_change  accuracy  seconds/forward  share/forward

g is the gradient before clipping, the update x_{n+1} − x_n; "last" means the step right before this one, measured or
not. Where there is none (the first step) its products are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from apps.training.reporting.records import StepRecord
from compiled.measuring import COLUMNS, KINDS, Measuring

ALL = "all"
_PART = re.compile(r"^(?:model\.)?(.*?\.\d+)\.")  # up to the number of a block


@dataclass(frozen=True)
class Measured:
    """A measured step's numbers on the host: the table [parameters, COLUMNS] and the share of tokens predicted."""

    table: Tensor
    accuracy: float
    seconds: Mapping[str, float]  # by phase


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

    def tell(self, record: StepRecord, measured: Measured | None) -> None:
        """A step was taken, and perhaps measured."""
        last_loss, self.last_loss = self.last_loss, record.loss
        if measured is None:
            return
        values = {"accuracy": measured.accuracy}
        summed: dict[str, float] = {}
        if last_loss is not None:
            summed["loss_change"] = record.loss - last_loss
        for name, rows in self.groups.items():
            norms, products = _of_group(measured.table[list(rows)])
            values |= {f"{key}/{name}": value for key, value in norms.items()}
            summed |= {f"{key}/{name}": value for key, value in products.items()}
        for key, value in summed.items():
            self.sums[f"sum_{key}"] = self.sums.get(f"sum_{key}", 0.0) + value
        values |= summed | {f"sum_{key}": self.sums[f"sum_{key}"] for key in summed}
        other = record.seconds - sum(measured.seconds.values())
        for phase, seconds in {**measured.seconds, "other": max(other, 0.0)}.items():
            values |= {f"seconds/{phase}": seconds, f"share/{phase}": seconds / record.seconds}
        self.latest = (record.step, values)

    def values_of(self, step: int) -> dict[str, float]:
        """The numbers of step `step`, if it was the last one measured."""
        return self.latest[1] if self.latest[0] == step else {}


def groups_of(names: Sequence[str], by: str) -> dict[str, list[int]]:
    """Group → its rows, for the parameters `names` in order; `by`: "part" or "parameter". All of them come first."""
    groups: dict[str, list[int]] = {ALL: list(range(len(names)))}
    for row, name in enumerate(names):
        groups.setdefault(part_of(name) if by == "part" else name, []).append(row)
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
