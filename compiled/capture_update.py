"""The optimizer's part of the step: the update of a group of parameters as one region, and the sums it may need first.

What an update rule may look at is a group's tensors, each whole. A rule that needs a number over all of its parameters
names it (`total_names`): then a second region gives a group's share of it, and the update gets the sum.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from backends.precision import PrecisionPolicy, as_torch
from backends.split_masters import REST, join, split
from backends.stochastic_rounding import COLUMNS, key_of, round_to_bfloat16
from compiled.accumulation import accumulation_dtype
from compiled.capture import Captured, Sources, capture_function

Shape = tuple[int, ...]


class Optimizer(Protocol):
    """A pure update rule; every number that may change between runs is in `hyper`, a 0-d tensor each."""

    @property
    def key(self) -> str:
        """Equal for two rules that trace to the same graph."""

    @property
    def hyperparameter_names(self) -> Sequence[str]: ...

    @property
    def total_names(self) -> Sequence[str]:
        """Sums over all of the rule's parameters that its update needs: they stand in `hyper` too."""

    def state_shapes(self, shape: Shape) -> Mapping[str, Shape]:
        """State → shape, for a parameter of `shape`."""

    def totals(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """One parameter's share of the sums, 0-d, by name."""

    def update_group(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        hypers: Mapping[str, Mapping[str, Tensor]],
    ) -> Mapping[str, tuple[Tensor, Mapping[str, Tensor]]]:
        """New parameter and state of several tensors, by name."""


def totals_of(optimizers: Iterable[Optimizer]) -> list[tuple[str, str]]:
    """The sums there are, as (rule's key, name), in the order in which regions give and take them."""
    rules = {each.key: each for each in optimizers}
    return [(key, name) for key, rule in rules.items() for name in rule.total_names]


class UpdateCapture:
    """Traces one group: `optimizers` gives each parameter's rule, by the name that the region uses.

    Inputs: `hyperparameters` [number of parameters, `columns`] (a row each, so that every parameter may have its own
    rate and decay; the first columns are its optimizer's, the last the key of stochastic rounding), `grad_coef` 0-d
    (clipping), then for each parameter p: p, `grad_p`, `<state>_p`…, if there is a master `master_p`, or `rest_p` of a
    split one, and for the update last `totals`, the sums over all groups, where a rule wants some. Arithmetic is done
    in at least float32.

    `totals`: all sums of the step, as `totals_of` gives them. `skips`: a grad_coef that is not finite leaves everything
    as it is. `pairs`: each gradient comes in two parts, `grad_p` and `addend_p`, of its dtype, which are summed in at
    least float32: two workers' gradients need no pass over memory of their own to be added up.
    """

    def __init__(
        self,
        optimizers: Mapping[str, Optimizer],
        parameters: Mapping[str, Tensor],
        gradient_dtypes: Mapping[str, torch.dtype],
        policy: PrecisionPolicy,
        sources: Sources,
        columns: int,
        totals: Sequence[tuple[str, str]] = (),
        skips: bool = False,
        pairs: bool = False,
    ) -> None:
        self.skips, self.pairs = skips, pairs
        self.parameters, self.policy, self.columns, self.totals = parameters, policy, columns, list(totals)
        self.with_master, self.splits = policy.master != "none", policy.rounding == "split"
        self.master = REST if self.splits else "master"
        self.work = accumulation_dtype(as_torch(policy.master if self.with_master else policy.parameters))
        self.members: dict[str, tuple[Optimizer, list[str]]] = {}  # by rule, in the order in which they come
        for name in parameters:
            self.members.setdefault(optimizers[name].key, (optimizers[name], []))[1].append(name)
        self.states = {name: optimizers[name].state_shapes(tuple(each.shape)) for name, each in parameters.items()}
        self.inputs = {
            "hyperparameters": sources.empty((len(parameters), columns), self.work),
            "grad_coef": sources.empty((), self.work),
        }
        self.mutated: list[str] = []
        for name, tensor in parameters.items():
            self.inputs[name] = sources.like(tensor)
            for part in ("grad", "addend") if pairs else ("grad",):
                self.inputs[f"{part}_{name}"] = sources.empty(tensor.shape, gradient_dtypes[name])
            for state, shape in self.states[name].items():
                self.inputs[f"{state}_{name}"] = sources.empty(shape, as_torch(policy.moments))
            if self.with_master:
                kept = torch.int16 if self.splits else as_torch(policy.master)
                self.inputs[f"{self.master}_{name}"] = sources.empty(tensor.shape, kept)
            self.mutated += [name, *(f"{state}_{name}" for state in self.states[name])]
            self.mutated += [f"{self.master}_{name}"] if self.with_master else []
        self.sums = {"totals": sources.empty((len(self.totals),), self.work)} if self.totals else {}

    def update(self, name: str) -> Captured:
        """The update, in place; its output is a copy of grad_coef (a region must return something)."""
        inputs = self.inputs | self.sums

        def update(*flat: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(inputs, flat, strict=True))
            for rule, members in self.members.values():
                updated = rule.update_group(*self._given(named, rule, members))
                apart = {each: _apart(*updated[each], flat) for each in members}
                for each in members:
                    self._store(named, each, *apart[each])
            return (named["grad_coef"] + 0,)

        return capture_function(name, update, inputs, ["done"], self.mutated)

    def total(self, name: str) -> Captured:
        """This group's share of the sums: the inputs of the update but for `totals` → `totals`, in their order."""

        def total(*flat: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(self.inputs, flat, strict=True))
            shares: dict[tuple[str, str], list[Tensor]] = {each: [] for each in self.totals}
            for key, (rule, members) in self.members.items():
                given = self._given(named, rule, members)
                for each in members if rule.total_names else ():
                    for label, share in rule.totals(*(part[each] for part in given)).items():
                        shares[key, label].append(share)
            nothing = torch.zeros((), dtype=self.work, device=named["grad_coef"].device)
            return (torch.stack([torch.stack([nothing, *found]).sum() for found in shares.values()]),)

        return capture_function(name, total, self.inputs, ["totals"])

    def _given(
        self, named: Mapping[str, Tensor], rule: Optimizer, members: Sequence[str]
    ) -> tuple[dict[str, Any], ...]:
        """Parameters, gradients, states and numbers of a rule's members, in the dtype of the arithmetic."""
        work, rows = self.work, {name: row for row, name in enumerate(self.parameters)}
        sums = {}
        if "totals" in named:
            sums = {label: named["totals"][i] for i, (key, label) in enumerate(self.totals) if key == rule.key}
        table = named["hyperparameters"]
        return (
            {each: self._value(named, each).to(work) for each in members},
            {each: self._gradient(named, each).to(work) * named["grad_coef"] for each in members},
            {each: {key: named[f"{key}_{each}"].to(work) for key in self.states[each]} for each in members},
            {
                each: {key: table[rows[each], column] for column, key in enumerate(rule.hyperparameter_names)} | sums
                for each in members
            },
        )

    def _value(self, named: Mapping[str, Tensor], name: str) -> Tensor:
        """What the optimizer updates: the parameter, or its master."""
        if self.splits:
            return join(named[name], named[f"{REST}_{name}"])
        return named[f"master_{name}" if self.with_master else name]

    def _gradient(self, named: Mapping[str, Tensor], name: str) -> Tensor:
        gradient = named[f"grad_{name}"]
        if not self.pairs:
            return gradient
        wide = accumulation_dtype(gradient.dtype)
        return gradient.to(wide) + named[f"addend_{name}"].to(wide)

    def _store(self, named: Mapping[str, Tensor], name: str, parameter: Tensor, state: Mapping[str, Tensor]) -> None:
        applied = torch.isfinite(named["grad_coef"]) if self.skips else None
        if applied is not None:
            # from the master where there is one: the parameter, its rounding, need not be read
            parameter = torch.where(applied, parameter, self._value(named, name))
        for key, value in state.items():
            kept = named[f"{key}_{name}"]
            kept.copy_(value if applied is None else torch.where(applied, value, kept))
        if self.splits:
            parameter, rest = split(parameter)
            named[f"{REST}_{name}"].copy_(rest)
        elif self.with_master:
            named[f"master_{name}"].copy_(parameter)
        if self.policy.rounding == "stochastic":
            row = list(self.parameters).index(name)
            parameter = round_to_bfloat16(parameter, key_of(named["hyperparameters"][row, self.columns - COLUMNS :]))
        named[name].copy_(parameter)


def _apart(
    parameter: Tensor, state: Mapping[str, Tensor], inputs: Iterable[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same values in memory of their own: a rule may hand on what it was given, which is about to be written to."""
    taken = {each.untyped_storage()._cdata for each in inputs}

    def own(value: Tensor) -> Tensor:
        # not a clone: Inductor drops it, and reads the original when that has been written to
        return torch.where(torch.isnan(value), value, value) if value.untyped_storage()._cdata in taken else value

    return own(parameter), {key: own(value) for key, value in state.items()}
