"""Reading what was given: the command line and the config file as one list of dotted assignments."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from apps.training.config_keys import Key, keys_of, plugin_config, plugin_packages, sections_of
from apps.training.config_yaml import read_yaml_mapping
from backends.errors import UserError


@dataclasses.dataclass(frozen=True)
class Assignment:
    """One `path=value`. From the command line `value` is still text; `added` marks a `+path`."""

    path: str
    value: Any
    origin: str = ""  # " in FILE" for what a config file says
    added: bool = False


def read_arguments(argv: Sequence[str], schema: type) -> list[Assignment]:
    """Everything given, the file's settings first; a key given twice on the command line is a mistake."""
    line: dict[str, Assignment] = {}
    for argument in argv:
        path, equals, value = argument.partition("=")
        if not equals or path.startswith("-"):
            raise UserError(_not_an_assignment(argument, schema))
        added = path.startswith("+")
        item = Assignment(_full_path(path.removeprefix("+"), schema), value, added=added)
        if item.path in line:
            raise UserError(f"'{item.path}' is given twice: {line[item.path].value} and {value}. Keep one of them.")
        line[item.path] = item
    file = line.pop("config", None) if "config" not in keys_of(schema) else None
    from_file = flatten(read_yaml_mapping(file.value), schema, f" in {file.value}") if file else []
    return [*from_file, *line.values()]


def _not_an_assignment(argument: str, schema: type) -> str:
    bare = argument.lstrip("-")
    meant = f"{bare.partition('=')[0]}={bare.partition('=')[2] or 'VALUE'}"
    for key in keys_of(schema).values():
        if bare in key.choices:
            meant = f"{key.path}={bare}"
    return f"Cannot read '{argument}'. Expected key=value. Did you mean '{meant}'? See --help."


def _full_path(path: str, schema: type) -> str:
    """`optimizer` → `optimizer.name` for a section that has a plugin."""
    return f"{path}.name" if path in plugin_packages(schema) else path


def flatten(mapping: Mapping[Any, Any], schema: type, origin: str, prefix: str = "") -> list[Assignment]:
    """A file's nested sections as dotted assignments; what lies under `extra` is what `+key` had added."""
    sections = sections_of(keys_of(schema))
    free = {field.name for field in dataclasses.fields(schema) if field.metadata.get("free")}
    items: list[Assignment] = []
    for name, value in mapping.items():
        path = f"{prefix}{name}"
        if path in free and isinstance(value, Mapping):
            items += [Assignment(str(key), added, origin, added=True) for key, added in value.items()]
        elif path in sections and isinstance(value, Mapping | None):
            items += flatten(value or {}, schema, origin, path + ".")  # `model:` with nothing under it is no mistake
        else:
            items.append(Assignment(_full_path(path, schema), value, origin))
    return items


def choose_plugins(schema: type, given: list[Assignment]) -> tuple[dict[str, Key], list[Assignment]]:
    """The keys with the chosen plugins' own, and `given` without a file's settings for a plugin no longer chosen."""
    names = {item.path: item for item in given}
    chosen = {}
    for section in plugin_packages(schema):
        if f"{section}.name" in names:
            chosen[section] = str(names[f"{section}.name"].value)
    keys = keys_of(schema, chosen)
    for section, package in plugin_packages(schema).items():
        of_file = [item.value for item in given if item.path == f"{section}.name" and item.origin]
        if of_file and of_file[0] != chosen[section]:
            gone = {f"{section}.{field.name}" for field in dataclasses.fields(plugin_config(package, of_file[0]))}
            given = [item for item in given if not (item.origin and item.path in gone)]
    return keys, given
