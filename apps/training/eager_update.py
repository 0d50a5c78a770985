"""The eager twin's optimizers: torch.optim.AdamW for what is AdamW, and a rule's own update, run eagerly, for the rest.

Both update wide weights in place; the numbers come in the table that the compiled step is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from apps.training.optimizers.adamw import AdamW
from apps.training.parameter_groups import ParameterGroup


class EagerUpdate(Protocol):
    """Optimizer state by parameter and name, and the update of the weights it was given."""

    @property
    def state(self) -> Mapping[str, Mapping[str, Tensor]]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a state, as `<parameter>.<name>` → tensor."""

    def moments(self) -> Iterable[Tensor]:
        """The live tensors of the state that the policy stores in a dtype of its own."""

    def step(self, gradients: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        """Update in place; `rows`: the numbers of each parameter, on the host."""

    def skip(self) -> None:
        """A step without an update: it counts as a step all the same."""


def is_torchs(group: ParameterGroup) -> bool:
    """Whether torch.optim has the group's rule."""
    update: Any = type(group.rule).update
    return update is AdamW.update and not any(group.rule.fixed.values())


def make_updates(groups: Sequence[ParameterGroup], weights: Mapping[str, Tensor]) -> list[EagerUpdate]:
    """What together updates `weights`, by full name."""
    torchs = [group for group in groups if is_torchs(group)]
    rest = [group for group in groups if not is_torchs(group)]
    made: list[EagerUpdate] = [TorchAdamW(torchs, weights)] if torchs else []
    return made + ([PureUpdates(rest, weights)] if rest else [])


class TorchAdamW:
    """torch.optim.AdamW: shares no code with the compiled step."""

    def __init__(self, groups: Sequence[ParameterGroup], weights: Mapping[str, Tensor]) -> None:
        self.groups = groups
        self.weights = {name: weights[name] for group in groups for name in group.shapes}
        self.optimizer = torch.optim.AdamW(
            [{"params": [self.weights[name] for name in group.shapes]} for group in groups], fused=True
        )

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.optimizer.state[weight] for name, weight in self.weights.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        keys = (*AdamW.state_names, "step")
        for name, weight in self.weights.items():
            self.optimizer.state[weight] = {key: tensors[f"{name}.{key}"].clone() for key in keys}

    def moments(self) -> Iterable[Tensor]:
        return [states[key] for states in self.state.values() for key in AdamW.state_names]

    def step(self, gradients: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        for group, options in zip(self.groups, self.optimizer.param_groups, strict=True):
            number = _numbers(group, rows)
            options["lr"], options["betas"] = number["lr"], (number["beta1"], number["beta2"])
            options["eps"], options["weight_decay"] = number["eps"], number["weight_decay"]
        for name, weight in self.weights.items():
            weight.grad = gradients[name]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def skip(self) -> None:
        """torch counts the steps for the bias corrections itself."""
        for weight in self.weights.values():
            state = self.optimizer.state[weight]
            if not state:
                state["step"] = torch.zeros((), device=weight.device)
                state |= {name: torch.zeros_like(weight) for name in AdamW.state_names}
            state["step"] += 1


class PureUpdates:
    """The rules' `update_group`, a group at a time."""

    def __init__(self, groups: Sequence[ParameterGroup], weights: Mapping[str, Tensor]) -> None:
        self.groups, self.weights = groups, weights
        self.state = {
            name: {
                state: torch.zeros(shape, dtype=weights[name].dtype, device=weights[name].device)
                for state, shape in group.rule.state_shapes(shape).items()
            }
            for group in groups
            for name, shape in group.shapes.items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, states in self.state.items():
            for key, value in states.items():
                value.copy_(tensors[f"{name}.{key}"])

    def moments(self) -> Iterable[Tensor]:
        return [value for states in self.state.values() for value in states.values()]

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
        hypers = [
            {key: self._number(list(group.shapes), value) for key, value in _numbers(group, rows).items()}
            for group in self.groups
        ]
        totals = self._totals(gradients, hypers)
        for group, hyper in zip(self.groups, hypers, strict=True):
            names = list(group.shapes)
            updated = group.rule.update_group(
                {name: self.weights[name].detach() for name in names},
                {name: gradients[name] for name in names},
                {name: self.state[name] for name in names},
                dict.fromkeys(names, hyper | totals.get(group.rule.key, {})),
            )
            pairs = [(self.weights[name], weight) for name, (weight, _) in updated.items()]
            pairs += [(self.state[name][key], each) for name, (_, new) in updated.items() for key, each in new.items()]
            # copies first: a rule may hand on what it was given, which is about to be written to
            for target, value in [(target, value.clone()) for target, value in pairs]:
                target.copy_(value)

    def skip(self) -> None:
        pass  # the steps are counted in the numbers

    def _totals(
        self, gradients: Mapping[str, Tensor], hypers: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, dict[str, Tensor]]:
        """By rule, what it sums over all of its parameters."""
        sums: dict[str, dict[str, Tensor]] = {}
        for group, hyper in zip(self.groups, hypers, strict=True):
            found = sums.setdefault(group.rule.key, {})
            for name in group.shapes if group.rule.total_names else ():
                weight = self.weights[name].detach()
                for key, share in group.rule.totals(weight, gradients[name], self.state[name], hyper).items():
                    found[key] = found.get(key, 0) + share
        return sums

    def _number(self, names: Iterable[str], value: float) -> Tensor:
        weight = self.weights[next(iter(names))]
        return torch.tensor(value, dtype=weight.dtype, device=weight.device)


def _numbers(group: ParameterGroup, rows: Mapping[str, Tensor]) -> dict[str, float]:
    """The numbers that all parameters of a group have in common."""
    names = group.rule.hyperparameter_names
    table = torch.stack([rows[name][: len(names)] for name in group.shapes])
    assert (table == table[:1]).all(), "parameters of one group must share their hyper-parameters"
    return dict(zip(names, table[0].tolist(), strict=True))
