"""Plugins found by file name: a folder's public Python files, each holding one subclass of a known base.

A plugin from outside is named `package.module:Class`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TypeVar

from backends.errors import unknown
from backends.outside_class import defined_in, outside_class

T = TypeVar("T")


def find(folder: str) -> tuple[str, ...]:
    """Names of the plugins in `folder`, sorted: its Python files that do not start with an underscore."""
    return tuple(sorted(path.stem for path in Path(folder).glob("*.py") if not path.stem.startswith("_")))


def load_subclass(package: str, folder: str, name: str, base: type[T], *, kind: str) -> type[T]:
    """The one public subclass of `base` that `package.name` defines, or the class `module:Class`.

    UserError when there is no such file, module or class.
    """
    if ":" in name:
        return outside_class(name, base, kind)
    names = find(folder)
    if name not in names:
        raise unknown(kind, name, names)
    module = importlib.import_module(f"{package}.{name}")
    defined = defined_in(module, base)
    if len(defined) != 1:
        raise TypeError(f"{module.__file__} must define exactly one subclass of {base.__name__}, got {len(defined)}")
    return defined[0]
