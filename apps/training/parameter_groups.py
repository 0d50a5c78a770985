"""Which rule updates which parameter: the settings of `optimizer.groups` over the parameters of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from apps.training.config_schema import OptimizerConfig
from apps.training.optimizer_groups import GroupSettings, group_settings
from apps.training.optimizers import Optimizer, Role
from apps.training.optimizers._base import Shape
from apps.training.tables import text_table
from backends.errors import UserError


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with one rule and one set of numbers at every step. `is_decayed`: weight decay applies to them."""

    match: str
    name: str
    rule: Optimizer
    settings: Any
    is_decayed: bool
    shapes: dict[str, Shape]  # by full name

    def numbers(self, step: int, lr: float) -> dict[str, float]:
        """The rule's numbers for update `step` (from 1), `lr` being the schedule's rate for the peak `settings.lr`."""
        return self.rule.hyperparameters(self.settings, step, lr, self.is_decayed)


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[ParameterGroup]:
    """The groups of a model's trained parameters. UserError for an entry of `optimizer.groups` that names none."""
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    roles = roles_of(model)
    return group_parameters(config, {name: (tuple(each.shape), roles[name]) for name, each in trained.items()})


def group_parameters(config: OptimizerConfig, parameters: Mapping[str, tuple[Shape, Role]]) -> list[ParameterGroup]:
    """As `parameter_groups`, for parameters given as name → shape and role."""
    entries = group_settings(config)
    chosen = {name: next(entry for entry in entries if entry.matches(name)) for name in parameters}
    for entry in entries[:-1]:
        _require_used(entry, chosen)
    groups: dict[tuple[int, str, bool], ParameterGroup] = {}
    for name, (shape, role) in parameters.items():
        entry = chosen[name]
        part = entry.optimizer.part(name, shape, role)
        rule = part(**{key: getattr(entry.settings, key) for key in part.structure})
        is_decayed = entry.decays_all or role != "vector"
        key = (entries.index(entry), rule.key, is_decayed)
        group = groups.setdefault(
            key, ParameterGroup(entry.match, entry.name, rule, entry.settings, is_decayed, shapes={})
        )
        group.shapes[name] = shape
    return [group for _, group in sorted(groups.items(), key=lambda item: item[0][0])]


def roles_of(model: nn.Module) -> dict[str, Role]:
    """What each parameter is for: embeddings and head as the model names them, the rest by their dimensions."""
    ends: dict[Role, Any] = {"head": "get_output_embeddings", "embedding": "get_input_embeddings"}  # a tied one: last
    known: dict[nn.Parameter, Role] = {}
    for role, getter in ends.items():
        module = getattr(model, getter, lambda: None)()
        known |= {each: role for each in module.parameters() if each.ndim >= 2} if module is not None else {}
    return {name: known.get(each, "matrix" if each.ndim >= 2 else "vector") for name, each in model.named_parameters()}


def rules_of(groups: Sequence[ParameterGroup]) -> dict[str, Optimizer]:
    """The rule of each trained parameter, by its full name."""
    return {name: group.rule for group in groups for name in group.shapes}


def state_elements(groups: Sequence[ParameterGroup]) -> int:
    """Numbers of optimizer state, masters aside."""
    return sum(
        math.prod(extents)
        for group in groups
        for shape in group.shapes.values()
        for extents in group.rule.state_shapes(shape).values()
    )


def groups_table(groups: Sequence[ParameterGroup]) -> str:
    """What a run prints: a line for each group, with its peak rate and its decay."""
    rows = []
    for group in groups:
        numbers = group.numbers(1, group.settings.lr)
        label = f"{group.name} {group.rule.label}".strip()
        rate, decay = (f"{numbers[key]:g}" if key in numbers else "" for key in ("lr", "weight_decay"))
        elements = sum(math.prod(shape) for shape in group.shapes.values())
        rows.append(
            (group.match, label, rate, decay, f"{len(group.shapes):,}", f"{elements:,}", next(iter(group.shapes)))
        )
    return text_table(("group", "optimizer", "lr", "weight_decay", "tensors", "parameters", "first"), rows)


def _require_used(entry: GroupSettings, chosen: Mapping[str, GroupSettings]) -> None:
    if any(each is entry for each in chosen.values()):
        return
    taken = [name for name in chosen if entry.matches(name)]
    if taken:
        first = chosen[taken[0]].match
        raise UserError(
            f"optimizer.groups: '{entry.match}' has nothing left, since '{first}' comes before it. "
            "Expected the more special pattern first."
        )
    names = list(chosen)
    shown = ", ".join(names[:3] + names[-1:]) if len(names) > 4 else ", ".join(names)
    raise UserError(
        f"optimizer.groups: '{entry.match}' matches none of the {len(names)} trained parameters. "
        f"Expected a glob over full names, such as {shown}."
    )
