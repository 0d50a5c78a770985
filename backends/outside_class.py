"""A class from outside the house, named `package.module:Class`: a backend, an optimizer, a schedule."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TypeVar

from backends.errors import UserError, did_you_mean

T = TypeVar("T")


def outside_class(name: str, base: type[T], kind: str) -> type[T]:
    """The subclass of `base` that `name` names; UserError, which calls it a `kind`, when there is none."""
    module_name, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError, TypeError) as error:
        # A module that exists but fails on an import of its own must not be reported as missing.
        raise UserError(
            f"Cannot import module '{module_name}' of {kind} '{name}': {error}. "
            "Expected package.module:Class with the package installed or on PYTHONPATH."
        ) from error
    found = getattr(module, class_name, None)
    if found is None:
        names = [each.__name__ for each in defined_in(module, base)]
        raise UserError(
            f"Module '{module_name}' has no class '{class_name}'.{did_you_mean(class_name, names)} "
            f"Of {kind}s it defines: {', '.join(names) or 'none'}."
        )
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"'{name}' is no {kind}. Expected a subclass of {base.__module__}.{base.__name__}, got {found!r}."
        )
    return found


def defined_in(module: ModuleType, base: type[T]) -> list[type[T]]:
    """The public subclasses of `base` that a module itself defines."""
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
