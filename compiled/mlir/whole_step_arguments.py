"""Names, roles, dtypes and shapes of what goes into the whole step and comes out of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backends.precision import PrecisionPolicy, as_torch
from compiled.accumulation import accumulation_dtype
from compiled.capture import Captured
from compiled.mlir.modules import ModuleSpec, Role, Value
from compiled.objective import TERMS
from compiled.schedule import Schedule

NAME = "step"


class StepArguments:
    """`names`: all parameters of the model, in the order of the rows of `hyperparameters`.

    A parameter or state has the model's name, optimizer state `STATE.PARAMETER`, the wider copy `master.PARAMETER`, a
    new value `new_` and the name.
    """

    def __init__(
        self, regions: Mapping[str, Captured], schedule: Schedule, names: Sequence[str], policy: PrecisionPolicy
    ) -> None:
        self.row_of = {name: row for row, name in enumerate(names)}
        self.with_master = policy.master != "none"
        self.values: dict[str, Value] = {}
        self.new: list[str] = []  # names of the arguments whose new value is a result
        work = accumulation_dtype(as_torch(policy.master if self.with_master else policy.parameters))
        self._work = str(work).removeprefix("torch.")
        inputs = {name: {each.name: each for each in part.spec.inputs} for name, part in regions.items()}
        for entry in (schedule.embed, *schedule.blocks, schedule.head):
            self._add_part(entry, inputs[entry.get("forward") or entry["train"]])
        columns = 0
        for group in schedule.updates:
            if group["direct"] is not None:
                columns = inputs[group["direct"]]["hyperparameters"].shape[1]
                self._add_group(group, inputs[group["direct"]])
        self._add_numbers(schedule, inputs, (len(names), columns))
        self.loss = regions[schedule.head["train"]].spec.outputs[0]

    @property
    def names(self) -> list[str]:
        return list(self.values)

    @property
    def results(self) -> list[str]:
        return ["loss", "grad_norm", *(f"new_{name}" for name in self.new)]

    def states_of(self, group: Mapping[str, Any], local: str) -> list[str]:
        """The optimizer's tensors of a parameter of `group`, the wider copy among them."""
        return [*group["state"][local], *(["master"] if self.with_master else [])]

    def examples(self) -> list[Tensor]:
        """Tensors of the arguments' shapes and dtypes, without storage."""
        return [
            torch.empty(each.shape, dtype=getattr(torch, each.dtype), device="meta") for each in self.values.values()
        ]

    def module(self) -> ModuleSpec:
        """What the manifest says."""
        results = [
            Value("loss", "loss", self.loss.dtype, self.loss.shape),
            Value("grad_norm", "loss", self._work, ()),
            *(Value(f"new_{name}", *_rest(self.values[name])) for name in self.new),
        ]
        position = {name: index for index, name in enumerate(self.values)}
        donations = [(position[name], 2 + index) for index, name in enumerate(self.new)]
        return ModuleSpec(NAME, NAME, list(self.values.values()), results, donations)

    def _add(self, name: str, role: Role, dtype: str, shape: tuple[int, ...]) -> None:
        self.values.setdefault(name, Value(name, role, dtype, shape))

    def _add_part(self, entry: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        roles: dict[str, Role] = {"parameters": "parameter", "state": "state"}
        for slots, role in roles.items():
            for local, full in entry[slots].items():
                if local in inputs:
                    self._add(full, role, inputs[local].dtype, inputs[local].shape)
        self.new += [entry["state"][local] for local in entry["reduce"]]

    def _add_group(self, group: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
        for local, full in group["parameters"].items():
            self.new.append(full)
            for state in self.states_of(group, local):
                spec = inputs[f"{state}_{local}"]
                self._add(f"{state}.{full}", "master" if state == "master" else "moment", spec.dtype, spec.shape)
                self.new.append(f"{state}.{full}")

    def _add_numbers(self, schedule: Schedule, inputs: Mapping[str, Any], table: tuple[int, int]) -> None:
        """Batch, tables and what may change between runs."""
        ids = inputs[schedule.embed["forward"]]["input_ids"]
        head = inputs[schedule.head["train"]]
        self._add("input_ids", "batch", ids.dtype, ids.shape)
        self._add("labels", "batch", head["labels"].dtype, ids.shape)
        self._add("grad_scale", "batch", head["grad_scale"].dtype, ids.shape)
        used = {name: spec for part in inputs.values() for name, spec in part.items()}
        roles: dict[str, Role] = {"first_row": "batch", "cos": "table", "sin": "table", "articles": "table"}
        roles.update(dict.fromkeys(TERMS, "hyper-parameter"))
        for name, role in roles.items():
            if name in used:
                self._add(name, role, used[name].dtype, used[name].shape)
        self._add("hyperparameters", "hyper-parameter", self._work, table)
        self._add("max_grad_norm", "hyper-parameter", self._work, ())


def _rest(value: Value) -> tuple[Role, str, tuple[int, ...]]:
    return value.role, value.dtype, value.shape
