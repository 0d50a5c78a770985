"""What a logger is: something that is told a run's settings and then its numbers, a step at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Run:
    """The run that a logger reports. `settings` are all of it, nested; steps up to `resumed_step` were reported before.

    `offline`: nothing may leave this machine. `folder` is the run's output folder.
    """

    project: str
    name: str
    run_id: str
    tags: tuple[str, ...]
    offline: bool
    folder: Path
    settings: Mapping[str, Any]
    resumed_step: int


class RunLogger:
    """A file in this folder holds one subclass. Every method is called from one thread, and may raise anything.

    Whatever it raises is said once, and the run goes on without the logger.
    """

    package: ClassVar[str | None] = None  # what has to be installed; the extra is called like the logger

    def __init__(self, run: Run) -> None:
        """Begin, or go on with, the report of `run`; the logger's package is imported here."""
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a step. Steps come in order; one may come twice, with other numbers (an evaluation)."""
        raise NotImplementedError

    def close(self, *, failed: bool) -> None:
        """No more numbers will come; `failed`: an error ended the run."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[f"{prefix}{name}"] = value
    return result
