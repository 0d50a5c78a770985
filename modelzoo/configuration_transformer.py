"""Hugging Face config <-> zoo config, through the one family that knows the config's exact type."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from backends.errors import UserError, unknown
from modelzoo.families import Family, discover


class ConfigurationTransformer:
    """Turns Hugging Face configs into zoo configs and back.

    `families` are the plugins to ask; by default the files of modelzoo/families.
    """

    def __init__(self, families: Sequence[Family] | None = None) -> None:
        self.families = discover() if families is None else tuple(families)

    def transform(self, config: PreTrainedConfig, **zoo_arguments: Any) -> Any:
        """The zoo config that stands for `config`, with `zoo_arguments` on top; nested configs are transformed too.

        A zoo config may be given again: it keeps the zoo arguments it has, except those given here. `config` is left as
        it is. Raises UserError when not exactly one family matches, for an architecture that the zoo does not have, and
        for arguments that no family met on the way takes.
        """
        taken: set[str] = set()
        transformed = self._transform(config, zoo_arguments, taken)
        for name in zoo_arguments:
            if name not in taken:
                raise unknown("zoo argument", name, sorted(taken | self._arguments_of(config)))
        return transformed

    def restore(self, config: PreTrainedConfig) -> Any:
        """The Hugging Face config that `config` was made from, with the changes made to its shared fields since."""
        family = self.family_of(config)
        if type(config) is family.hf_config:
            return config
        fields = _fields(config, self.restore)
        for name in family.zoo_arguments:
            fields.pop(name, None)
        names = {zoo: hugging_face for hugging_face, zoo in family.architectures.items()}
        return family.hf_config(**_with_architectures(fields, names))

    def family_of(self, config: PreTrainedConfig) -> Family:
        """The one family whose Hugging Face or zoo config type is exactly the type of `config`."""
        matching = [family for family in self.families if type(config) in (family.hf_config, family.zoo_config)]
        if len(matching) == 1:
            return matching[0]
        given = type(config).__name__
        if matching:
            raise UserError(f"{len(matching)} families match {given}. Expected exactly one: see modelzoo/families.")
        raise unknown("config type", given, sorted(family.hf_config.__name__ for family in self.families))

    def _transform(self, config: PreTrainedConfig, zoo_arguments: Mapping[str, Any], taken: set[str]) -> Any:
        family = self.family_of(config)
        given = {name: value for name, value in zoo_arguments.items() if name in family.zoo_arguments}
        taken.update(given)
        fields = _fields(config, lambda nested: self._transform(nested, zoo_arguments, taken))
        names = {**family.architectures, **{zoo: zoo for zoo in family.architectures.values()}}
        for architecture in fields.get("architectures") or ():
            if architecture not in names:
                raise unknown("architecture", architecture, sorted(family.architectures))
        family.check(config)
        return family.zoo_config(**{**_with_architectures(fields, names), **given})

    def _arguments_of(self, config: PreTrainedConfig) -> set[str]:
        nested = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
        return set(self.family_of(config).zoo_arguments).union(*map(self._arguments_of, nested))


def _fields(config: PreTrainedConfig, convert: Callable[[Any], Any]) -> dict[str, Any]:
    """What to build the counterpart of `config` from: its public attributes, nested configs converted."""
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    converted = {
        name: convert(value) if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)
        for name, value in fields.items()
    }
    return {**converted, "name_or_path": config.name_or_path}


def _with_architectures(fields: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    architectures = fields.get("architectures")
    if not architectures:
        return fields
    return {**fields, "architectures": [names.get(name, name) for name in architectures]}
