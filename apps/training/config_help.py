"""What `--help` prints: every key with type, default and one line of what it does, and the plugins there are."""

import dataclasses
import inspect
import textwrap
from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_type_hints

import backends
import modelzoo
from apps.training.config_keys import Key, keys_of, plugin_config

COLUMN = 50  # where the lines of help start


def help_text(schema: type, program: str, notes: str = "", outside: Mapping[str, str] | None = None) -> str:
    """The whole help of a program whose settings are the dataclass `schema`.

    `outside`: section → a plugin from outside, `package.module:Class`, whose settings are shown too.
    """
    outside = outside or {}
    keys = keys_of(schema)
    required = [f"{key.path}={key.type_name if key.choices else '…'}" for key in keys.values() if _is_required(key)]
    free = any(field.metadata.get("free") for field in dataclasses.fields(schema))
    optional = ["[key=value ...]", "[config=FILE.yaml]", *(["[+own.key=value ...]"] if free else [])]
    parts = [
        f"usage: {program} {' '.join([*required, *optional])}",
        inspect.cleandoc(schema.__doc__ or ""),
        "\n".join(_line(key) for key in keys.values() if "." not in key.path),
        *(_section(schema, field.name, outside.get(field.name)) for field in dataclasses.fields(schema)),
        "Settings come from the defaults, then from config=FILE.yaml, then from the command line. key=null unsets one.",
        notes,
    ]
    return "\n\n".join(part for part in parts if part)


def names_note() -> str:
    """The names that `backend.*` and `checkpoint.config_name` take. Imports no backend and no model."""
    return "\n".join(
        textwrap.fill(f"{kind} {', '.join(names)}", width=118, subsequent_indent=" " * 10)
        for kind, names in (("backends:", backends.available()), ("models:  ", modelzoo.named_configs()))
    )


def _section(schema: type, name: str, outside: str | None) -> str:
    """The lines of one section; "" for a field that is none."""
    kind: Any = get_type_hints(schema)[name]
    if not dataclasses.is_dataclass(kind):
        return ""
    lines = [name]
    packages = [field.metadata["plugin"] for field in dataclasses.fields(kind) if "plugin" in field.metadata]
    own = [field.name for field in dataclasses.fields(kind) if "plugin" not in field.metadata]
    keys = keys_of(kind, prefix=f"{name}.")  # type: ignore[arg-type]
    lines += [_line(key) for path, key in keys.items() if path.split(".")[1] in own]
    for package in packages:
        for plugin in (*import_module(package).available(), *([outside] if outside else [])):
            lines += ["", f"{name}={plugin}"]
            lines += [_line(key) for key in keys_of(plugin_config(package, plugin), prefix=f"{name}.").values()]
    return "\n".join(lines)


def _line(key: Key) -> str:
    default = "(required)" if _is_required(key) else f"= {_spelled(key.default)}"
    left = f"  {key.path}: {key.type_name} {default}"
    gap = " " * (COLUMN - len(left)) if len(left) < COLUMN - 1 else "\n" + " " * COLUMN
    return f"{left}{gap}{key.help}".rstrip()


def _is_required(key: Key) -> bool:
    return key.default is dataclasses.MISSING


def _spelled(value: Any) -> str:
    """A default as one would type it."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
