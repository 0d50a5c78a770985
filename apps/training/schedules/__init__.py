"""Learning-rate schedules: one file each, found by its name. Listing them imports none."""

from __future__ import annotations

from apps.training._discovery import find, load_subclass
from apps.training.schedules._base import Schedule

__all__ = ["Schedule", "available", "load"]


def available() -> tuple[str, ...]:
    """The names `schedule=` takes: the files of this folder."""
    return find(__path__[0])


def load(name: str) -> type[Schedule]:
    """The schedule class of `NAME.py`; UserError with a suggestion for an unknown name."""
    return load_subclass(__name__, __path__[0], name, Schedule, kind="schedule")
