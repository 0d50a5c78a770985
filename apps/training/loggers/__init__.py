"""Loggers: one file NAME_logger.py each, found by its name. Adding one edits no other file; listing them imports none.

The files end in _logger because a file called wandb.py would be imported in place of the package. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from apps.training._discovery import find, load_subclass
from apps.training.loggers._base import Run, RunLogger
from backends.errors import UserError, unknown

__all__ = ["Run", "RunLogger", "available", "load", "require_installed"]

_SUFFIX = "_logger"


def available() -> tuple[str, ...]:
    """The names `logging.report_to` takes: the files of this folder."""
    return tuple(name.removesuffix(_SUFFIX) for name in find(__path__[0]))


def load(name: str) -> type[RunLogger]:
    """The class in `NAME_logger.py`; UserError with a suggestion for an unknown name."""
    if name not in available():
        raise unknown("logger in logging.report_to", name, available())
    return load_subclass(__name__, __path__[0], name + _SUFFIX, RunLogger, kind="logger")


def require_installed(names: Sequence[str]) -> None:
    """UserError for a logger that does not exist, or whose package is not installed: it names the extra that has it."""
    for name in names:
        package = load(name).package
        if package is None:
            continue
        found = find_spec(package)
        if found is None or found.origin is None:  # a folder of that name, as runs leave one, is no package
            raise UserError(
                f"logging.report_to has {name}, and its package {package} is not installed. "
                f"Expected it beside this program: pip install 'substrate[{name}]'."
            )
