"""Plugins found by file name: a folder's public Python files, each holding one subclass of a known base.

A plugin from outside is named `package.module:Class`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from backends.errors import UserError, did_you_mean, unknown

T = TypeVar("T")


def find(folder: str) -> tuple[str, ...]:
    """Names of the plugins in `folder`, sorted: its Python files that do not start with an underscore."""
    return tuple(sorted(path.stem for path in Path(folder).glob("*.py") if not path.stem.startswith("_")))


def load_subclass(package: str, folder: str, name: str, base: type[T], *, kind: str) -> type[T]:
    """The one public subclass of `base` that `package.name` defines, or the class `module:Class`.

    UserError when there is no such file, module or class.
    """
    if ":" in name:
        return _outside_class(name, base, kind)
    names = find(folder)
    if name not in names:
        raise unknown(kind, name, names)
    module = importlib.import_module(f"{package}.{name}")
    defined = _defined(module, base)
    if len(defined) != 1:
        raise TypeError(f"{module.__file__} must define exactly one subclass of {base.__name__}, got {len(defined)}")
    return defined[0]


def _outside_class(name: str, base: type[T], kind: str) -> type[T]:
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
        names = [each.__name__ for each in _defined(module, base)]
        raise UserError(
            f"Module '{module_name}' has no class '{class_name}'.{did_you_mean(class_name, names)} "
            f"Defined in it: {', '.join(names) or 'none'}."
        )
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"'{name}' is no {kind}. Expected a subclass of {base.__module__}.{base.__name__}, got {found!r}."
        )
    return found


def _defined(module: ModuleType, base: type[T]) -> list[type[T]]:
    """The public subclasses of `base` that a module itself defines."""
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
