"""sweep.json: the settings each folder was made with, so that a sweep only goes on with its own runs. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.sweeping.trials import Trial
from apps.training.checkpointing.resume import is_free
from apps.training.config import to_mapping
from apps.training.config_rules import without_origins
from apps.training.files import atomic_path, is_filled
from apps.training.tables import text_table
from backends.errors import UserError
from compiled.spec import flatten

RECORD = "sweep.json"


def take_over(output: Path, trials: Sequence[Trial], launcher: str | None) -> None:
    """Make sure that what lies in `output` was made with the trials' settings, and write those of all its folders.

    A sweep may grow: points that are not there yet are added. UserError with a table where a folder's run had others.
    """
    stored = _read(output / RECORD)
    now = {trial.point.name: _decisive(trial, launcher) for trial in trials}
    for trial in trials:
        name = trial.point.name
        if name in stored:
            _require_equal(trial.folder, stored[name], now[name])
        elif is_filled(trial.folder):
            raise UserError(f"{trial.folder} holds something that no sweep made. Choose another output_dir.")
    with atomic_path(output / RECORD) as path:
        path.write_text(json.dumps(stored | now, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"Cannot read {path}: {error}. Remove it with its folder, or choose another output_dir."
        ) from None
    return stored if isinstance(stored, dict) else {}


def _decisive(trial: Trial, launcher: str | None) -> dict[str, Any]:
    """The settings that decide a run's numbers."""
    settings = {
        name: value for name, value in flatten(without_origins(to_mapping(trial.config))).items() if not is_free(name)
    }
    training = trial.config.training
    if training.global_batch_size is None:  # the rows of a step follow from the workers and their microbatches
        accumulation = training.gradient_accumulation_steps
        settings |= {"training.gradient_accumulation_steps": accumulation, "launcher": launcher}
    as_read: dict[str, Any] = json.loads(json.dumps(settings))
    return as_read


def _require_equal(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    names = [name for name in {**stored, **now} if stored.get(name, "–") != now.get(name, "–")]
    if names:
        table = [(name, stored.get(name, "–"), now.get(name, "–")) for name in names]
        raise UserError(
            f"{folder} was made with other settings. Give the same ones, or choose another output_dir:\n"
            f"{text_table(('setting', 'then', 'now'), table)}"
        )
