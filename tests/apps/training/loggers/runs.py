"""A run to report, small."""

from pathlib import Path
from typing import Any

from apps.training.loggers import Run


def a_run(folder: Path, **changes: Any) -> Run:
    given = {
        "project": "house",
        "name": "first",
        "run_id": "abcd1234",
        "tags": ("small", "cpu"),
        "offline": True,
        "folder": folder,
        "settings": {"optimizer": {"name": "adamw", "lr": 0.1}, "command": "run"},
        "resumed_step": 0,
    }
    return Run(**{**given, **changes})
