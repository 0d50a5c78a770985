"""Options from a config file, checked against a backend's Config dataclass before anything is built."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from backends.errors import UserError, unknown

ConfigT = TypeVar("ConfigT")


def build_config(config_class: type[ConfigT], options: Mapping[str, Any], backend_name: str) -> ConfigT:
    """Make the Config; an unknown field, a missing one or a value of another type is a UserError.

    Lists become tuples and whole numbers become floats where the field wants them: YAML cannot write either otherwise.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(config_class)
    for name in options:
        if name not in fields:
            raise unknown(f"{backend_name} option", name, fields)
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in options:
            raise UserError(f"Backend '{backend_name}' needs the option '{name}' ({_type_name(hints[name])}).")
    values = {}
    for name, value in options.items():
        fits, values[name] = _fit(value, hints[name])
        if not fits:
            raise UserError(
                f"Option '{name}' of backend '{backend_name}' is {value!r} ({type(value).__name__}). "
                f"Expected {_type_name(hints[name])}."
            )
    return config_class(**values)


def _fit(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` is a `hint`, and the value as the field stores it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        return next((result for result in (_fit(value, one) for one in arguments) if result[0]), (False, value))
    if origin is typing.Literal:
        return value in arguments, value
    if origin is tuple and isinstance(value, list | tuple):
        return _fit_tuple(value, arguments)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return True, float(value)
    if isinstance(value, bool):  # bool is an int to Python, not to a person
        return hint is bool, value
    kind = type(None) if hint is None else origin or hint
    return isinstance(kind, type) and isinstance(value, kind), value


def _fit_tuple(value: list[Any] | tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        return False, value
    results = [_fit(item, hint) for item, hint in zip(value, arguments, strict=True)]
    return all(fits for fits, _ in results), tuple(item for _, item in results)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(value) for value in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")
