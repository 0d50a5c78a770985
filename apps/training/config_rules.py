"""Rules in the settings. A `backend.rules_file` gives way to the settings it stands for, so that those are stored.

A run's config.yaml and its checkpoints then hold the rules themselves, and no file can be gone or changed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apps.training.config_arguments import Assignment
from apps.training.config_keys import Key
from backends import available
from backends.errors import UserError, unknown
from backends.routing_rules import Rule
from backends.rules_file import RulesFile, read_rules
from backends.yaml_reading import parse_yaml

FILE, RULES, DEFAULT = "backend.rules_file", "backend.rules", "backend.default"
LORA = {"r": "lora.r", "alpha": "lora.alpha"}


def with_rules_file(given: list[Assignment], keys: Mapping[str, Key]) -> list[Assignment]:
    """`given` with the last rules file replaced by backend.rules, backend.default and lora.*.

    Rules given beside the file, or in what counts more (the command line counts more than a file of settings), come
    before the file's, and other settings given there win over the file's. Rules given in what counts less are dropped.
    """
    files = [item for item in given if item.path == FILE]
    if FILE not in keys or not files:
        return given
    name, origin = files[-1].value, files[-1].origin
    level = next(number for number, item in enumerate(given) if item.origin == origin)
    lower, higher = _without(FILE, given[:level]), _without(FILE, given[level:])
    if name is None or (name == "null" and not origin):
        return [*lower, *higher]
    if origin and not (isinstance(name, str) and name):
        raise UserError(f"Wrong value {FILE}={name!r}{origin}. Expected {keys[FILE].expected}.")
    own = [item for item in higher if item.path == RULES]
    first = _as_list(own[-1]) if own else []
    if not name or first is None:
        return given  # an empty text, or rules that are no list: each gets the error that any setting does
    file = read_rules(name)
    rules = Assignment(RULES, [*first, *file.rules], f" in {file.name}")
    return [*_without(RULES, lower), *_settings_of(file, keys), *_without(RULES, higher), rules]


def check_rules(rules: Sequence[Mapping[str, Any]], default: str | Mapping[str, Any]) -> None:
    """Refuse what is no rule, and backends that are not there. Their options are checked when the model is planned."""
    names = [_checked(Rule.of_default, default, "backend.default").use]
    for number, rule in enumerate(rules):
        names.append(_checked(Rule.from_mapping, rule, f"backend.rules[{number}]").use)
    for name in names:
        if ":" not in name and name not in available():
            raise unknown("backend", name, available())


def without_origins(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings without the names of files that rules came from: they decide nothing."""
    backend = dict(settings["backend"])
    backend["rules"] = [_without_origin(rule) for rule in backend["rules"]]
    if isinstance(backend["default"], Mapping):
        backend["default"] = _without_origin(backend["default"])
    return {**settings, "backend": backend}


def _without_origin(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rule.items() if key != "origin"}


def _checked(read: Callable[[Any], Rule], given: Any, path: str) -> Rule:
    try:
        return read(given)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _without(path: str, given: list[Assignment]) -> list[Assignment]:
    return [item for item in given if item.path != path]


def _settings_of(file: RulesFile, keys: Mapping[str, Key]) -> list[Assignment]:
    """What the file says besides its rules."""
    origin = f" in {file.name}"
    settings = [Assignment(DEFAULT, file.default, origin)] if file.default is not None else []
    lora = file.lora or {}
    if lora.get("r") and LORA["r"] not in keys:
        raise UserError(f"Rules file {file.name} has use_lora = true, which this program has no settings for.")
    return settings + [Assignment(LORA[key], value, origin) for key, value in lora.items() if LORA[key] in keys]


def _as_list(item: Assignment) -> list[Any] | None:
    value = item.value if item.origin else parse_yaml(item.value, f"{RULES}={item.value}")
    fits = isinstance(value, list) and all(isinstance(rule, dict) for rule in value)
    return value if fits else None
