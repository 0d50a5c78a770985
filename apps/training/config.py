"""From a command line to typed settings: `section.key=value …`, `config=FILE.yaml`, `+own.key=value`, `--help`.

Values come from the schema's defaults, then the file, then the command line. Every mistake is one UserError that names
the key, what was given and what was expected.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from apps.training.config_arguments import Assignment, choose_plugins, flatten, read_arguments
from apps.training.config_help import help_text, names_note
from apps.training.config_keys import keys_of, plugin_config, plugin_packages, unknown_key
from apps.training.config_rules import check_rules, with_rules_file
from apps.training.config_schema import TrainConfig
from apps.training.config_values import convert
from apps.training.config_yaml import write_yaml
from apps.training.loggers import require_installed
from apps.training.optimizer_groups import group_settings
from apps.training.token_budget import check_budget
from backends.errors import UserError
from backends.yaml_reading import parse_yaml

T = TypeVar("T")


def parse(argv: Sequence[str], *, base: Mapping[str, Any] | None = None, base_name: str = "") -> TrainConfig:
    """The settings of train_llm. Raises UserError for a mistake and SystemExit after printing `--help`.

    `base`: nested settings (as `to_mapping` gives) under what `argv` says, in errors called `base_name`.
    """
    under = flatten(base or {}, TrainConfig, f" in {base_name}")
    config = parse_dataclass(TrainConfig, argv, program="train_llm.py", notes=names_note, base=under)
    _check(config)
    return config


def given_paths(argv: Sequence[str]) -> list[str]:
    """The dotted names of all settings that `argv`, or the file it names, gives."""
    given = with_rules_file(read_arguments(argv, TrainConfig), keys_of(TrainConfig))
    return list(dict.fromkeys(item.path for item in given))


def parse_dataclass(
    schema: type[T],
    argv: Sequence[str],
    *,
    program: str | None = None,
    notes: Callable[[], str] | None = None,
    base: Sequence[Assignment] = (),
) -> T:
    """An instance of the dataclass `schema` (flat or nested) from `argv`, over what `base` assigns.

    `notes` is text for the end of `--help`.
    """
    if any(argument in ("-h", "--help") for argument in argv):
        outside = dict(item.split("=", 1) for item in argv if item.partition("=")[0] in plugin_packages(schema))
        outside = {section: name for section, name in outside.items() if ":" in name}
        print(help_text(schema, program or Path(sys.argv[0]).name, notes() if notes else "", outside))
        raise SystemExit(0)
    given = [*base, *read_arguments(argv, schema)]
    keys, given = choose_plugins(schema, given)
    given = with_rules_file(given, keys)
    can_add = any(field.metadata.get("free") for field in dataclasses.fields(schema))  # type: ignore[arg-type]
    values = {path: key.default for path, key in keys.items()}
    extra: dict[str, Any] = {}
    for item in given:
        if item.path in keys:
            values[item.path] = convert(keys[item.path], item)
        elif item.added and can_add:
            _add(extra, item)
        else:
            raise unknown_key(item.path, keys, item.origin, can_add)
    missing = [key for path, key in keys.items() if values[path] is dataclasses.MISSING]
    if missing:
        first = missing[0]
        write = " or ".join(f"{first.path}={choice}" for choice in first.choices) or f'{first.path}="…"'
        raise UserError(f"{first.path} is missing ({first.help or first.type_name}). Expected {write}. See --help.")
    return _build(schema, values, extra)


def to_mapping(config: Any) -> dict[str, Any]:
    """The settings as nested plain values, a plugin's settings beside the common ones."""
    result: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "plugin" in field.metadata:
            result.update(to_mapping(value))
        elif not field.metadata.get("free") or value:
            result[field.name] = to_mapping(value) if dataclasses.is_dataclass(value) else value
    return result


def to_yaml(config: Any) -> str:
    """The effective settings as YAML; passed back with `config=FILE.yaml` they give an equal config."""
    return write_yaml(to_mapping(config))


def _check(config: TrainConfig) -> None:
    """Refuse what no single key can tell: settings that exclude each other, names of backends."""
    names = config.checkpoint
    if names.config_name is not None and names.model_name_or_path is not None:
        raise UserError(
            "Please specify exactly one of checkpoint.config_name or checkpoint.model_name_or_path; got "
            f"checkpoint.config_name={names.config_name} and checkpoint.model_name_or_path={names.model_name_or_path}."
        )
    steps = names.save_steps
    if isinstance(steps, list) and (not steps or min(steps) < 1):
        raise UserError(f"checkpoint.save_steps={steps}. Expected int, at least 1, or a list of such: [100, 500].")
    training = config.training
    if training.token_budget is not None:
        if training.max_steps is not None:
            raise UserError(
                f"Please specify at most one of training.max_steps and training.token_budget; got {training.max_steps} "
                f"and {training.token_budget}. KEY=null unsets one."
            )
        check_budget(training.token_budget)
    check_rules(config.backend.rules, config.backend.default)
    group_settings(config.optimizer)  # refuses what is no group
    if config.command == "run":
        require_installed(config.logging.report_to)
    assert config.precision  # refuses dtypes that do not go together


def _add(extra: dict[str, Any], item: Assignment) -> None:
    """Put a setting the schema lacks into `extra`, nested by its dots."""
    if item.value == "" and not item.origin:
        raise UserError(f"'+{item.path}=' has no value. Expected +{item.path}=VALUE.")
    *folders, last = item.path.split(".")
    if not all((*folders, last)):
        raise UserError(f"Cannot add '{item.path}'. Expected +section.key=value with a name between the dots.")
    place = extra
    for folder in folders:
        place = place.setdefault(folder, {})
        if not isinstance(place, dict):
            raise UserError(f"Cannot add '{item.path}': '{folder}' has a value already. Expected a section there.")
    if isinstance(place.get(last), dict):
        raise UserError(f"Cannot add '{item.path}': '{last}' is a section already. Expected +{item.path}.KEY=VALUE.")
    value = item.value if item.origin else parse_yaml(item.value, f"+{item.path}={item.value}")
    try:
        place[last] = json.loads(json.dumps(value, default=_as_text))
    except (TypeError, ValueError):
        raise UserError(
            f"'{item.path}'{item.origin} holds what JSON, and so a checkpoint, cannot: {value!r}. Expected numbers, "
            "texts, lists or sections with names; quote what is to be a text."
        ) from None


def _as_text(value: Any) -> str:
    """A date that YAML has read (a datetime is one), which is a label here. TypeError for anything else."""
    if not isinstance(value, date):
        raise TypeError
    return value.isoformat()


def _build(schema: type[T], values: Mapping[str, Any], extra: dict[str, Any], prefix: str = "") -> T:
    """Instances of the schema's dataclasses, filled from dotted `values`."""
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(schema):  # type: ignore[arg-type]
        kind: Any = get_type_hints(schema)[field.name]
        if dataclasses.is_dataclass(kind):
            arguments[field.name] = _build(kind, values, extra, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        elif "plugin" in field.metadata:
            plugin = plugin_config(field.metadata["plugin"], values[f"{prefix}name"])
            names = [inner.name for inner in dataclasses.fields(plugin)]
            arguments[field.name] = plugin(**{name: values[prefix + name] for name in names})
        else:
            arguments[field.name] = extra if field.metadata.get("free") else values[prefix + field.name]
    return schema(**arguments)
