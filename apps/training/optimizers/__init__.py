"""Optimizers: one file each, found by its name. Adding one edits no other file; listing them imports none."""

from __future__ import annotations

from apps.training._discovery import find, load_subclass
from apps.training.optimizers._base import Optimizer, Role

__all__ = ["Optimizer", "Role", "available", "load"]


def available() -> tuple[str, ...]:
    """The names `optimizer=` takes: the files of this folder."""
    return find(__path__[0])


def load(name: str) -> type[Optimizer]:
    """The optimizer class of `NAME.py`, or `package.module:Class` from outside; UserError for an unknown one."""
    return load_subclass(__name__, __path__[0], name, Optimizer, kind="optimizer")
