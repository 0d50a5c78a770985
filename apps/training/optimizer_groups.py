"""`optimizer.groups` as settings: which optimizer with which values a pattern names. Imports no torch.

An entry is `{match: PATTERN, optimizer: NAME, key: value, …}`. PATTERN is a glob over a parameter's full name; the
first that matches wins. Without `optimizer`, or with the run's own, what is not given is as the run has it; with
another one it is that optimizer's default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from apps.training import optimizers
from apps.training.config_arguments import Assignment
from apps.training.config_keys import keys_of
from apps.training.config_schema import OptimizerConfig
from apps.training.config_values import convert
from backends.errors import UserError, did_you_mean

DEFAULT = "(default)"
FORM = "Expected {match: PATTERN, optimizer: NAME, key: value, ...}."


@dataclasses.dataclass(frozen=True)
class GroupSettings:
    """What the parameters that `match` names are updated with.

    `decays_all`: weight_decay was given for this very pattern, so norms and biases are no exception.
    """

    match: str
    name: str
    optimizer: type[optimizers.Optimizer]
    settings: Any
    decays_all: bool = False

    def matches(self, parameter: str) -> bool:
        return self.match == DEFAULT or fnmatchcase(parameter, self.match)


def group_settings(config: OptimizerConfig) -> list[GroupSettings]:
    """The entries of `optimizer.groups` in their order, and last what holds for all other parameters.

    UserError for an entry that is none, an unknown optimizer or key, or a value that does not fit.
    """
    entries = [_read(config, number, entry) for number, entry in enumerate(config.groups)]
    chosen = optimizers.load(config.name)
    return [*entries, GroupSettings(DEFAULT, config.name, chosen, config.settings or chosen.Config())]


def _read(config: OptimizerConfig, number: int, entry: Mapping[str, Any]) -> GroupSettings:
    where = f"optimizer.groups[{number}]"
    if not isinstance(entry.get("match"), str):
        near = did_you_mean("match", [key for key in entry if key != "optimizer"])
        near = near.replace("Did you mean", "Is it what you meant by") if near else ""
        raise UserError(f"{where} is {dict(entry)}, without a text for 'match'.{near} {FORM}")
    name = entry.get("optimizer", config.name)
    if not isinstance(name, str):
        raise UserError(f"{where} has optimizer={name!r}. {FORM}")
    try:
        chosen = optimizers.load(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    keys = keys_of(chosen.Config)
    values = {}
    for key, value in entry.items():
        if key in ("match", "optimizer"):
            continue
        if key not in keys:
            near = did_you_mean(str(key), [*keys, "match", "optimizer"])
            raise UserError(f"{where} has '{key}', which {name} does not.{near} It has: {', '.join(keys)}.")
        values[key] = convert(keys[key], Assignment(key, value, f" in {where}"))
    own = config.settings if name == config.name else None
    base = own or chosen.Config()
    return GroupSettings(
        entry["match"], name, chosen, dataclasses.replace(base, **values), decays_all="weight_decay" in values
    )
