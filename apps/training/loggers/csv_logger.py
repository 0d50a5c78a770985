"""log.csv in the output folder: a row a step, a column for every number that was ever reported."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from apps.training.files import atomic_path
from apps.training.loggers._base import Run, RunLogger

FILE = "log.csv"
Row = dict[str, str]


class CsvLogger(RunLogger):
    """Rows are handed to the system at once. A number that comes for the first time makes the file be written anew."""

    def __init__(self, run: Run) -> None:
        self.path = run.folder / FILE
        rows = [row for row in _read(self.path) if int(row["step"]) <= run.resumed_step]
        self.columns = list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
        self.row: Row = rows[-1] if rows else {}  # the last one: its step may come once more
        self.begin = self._open(rows)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A step that comes twice has one row with all its numbers."""
        if self.row.get("step") == str(step):
            self.file.seek(self.begin)
            self.file.truncate()
        else:
            self.row = {"step": str(step)}
        self.row |= {name: repr(value) for name, value in values.items()}
        if new := [name for name in values if name not in self.columns]:
            self.file.close()
            self.columns += new
            self._open(_read(self.path))
        self.begin = self.file.tell()
        self._writer(self.file).writerow(self.row)
        self.file.flush()

    def close(self, *, failed: bool) -> None:
        self.file.close()

    def _open(self, rows: Sequence[Row]) -> int:
        """Write the file with these rows, and leave it open for more behind them; where the last one begins."""
        with atomic_path(self.path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = self._writer(file)
            writer.writeheader()
            writer.writerows(rows[:-1])
            begin = file.tell()
            writer.writerows(rows[-1:])
        self.file = self.path.open("r+", newline="", encoding="utf-8")
        self.file.seek(0, 2)
        return begin

    def _writer(self, file: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self.columns, restval="", lineterminator="\n")


def _read(path: Path) -> list[Row]:
    """The complete rows of a log without their empty places; none where there is no file, or the half of one."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        whole = [line for line in file if line.endswith("\n")]
    return [{name: text for name, text in row.items() if text} for row in csv.DictReader(whole)]
