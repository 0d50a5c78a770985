"""The steps so far as CSV with every number exact, and back."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

from apps.training.reporting.records import StepRecord

COLUMNS = tuple(field.name for field in fields(StepRecord))
_WHOLE = {"step", "epoch", "num_tokens", "num_counted", "skipped"}


def header() -> str:
    """The first line."""
    return ",".join(COLUMNS) + "\n"


def rows(records: Iterable[StepRecord]) -> str:
    """A line for each record. Floats are written as Python's shortest text that reads back to the same bits."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(astuple(record) for record in records)
    return text.getvalue()


def read_rows(path: Path) -> list[StepRecord]:
    """The records in a file of `header()` and `rows()`."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_record(row) for row in csv.DictReader(file)]


def _record(row: dict[str, str]) -> StepRecord:
    numbers: dict[str, Any] = {name: _number(name, text) for name, text in row.items()}
    return StepRecord(**numbers)


def _number(name: str, text: str) -> int | float | None:
    if not text:
        return None
    return int(text) if name in _WHOLE else float(text)
