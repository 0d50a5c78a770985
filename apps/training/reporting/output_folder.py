"""The folder a run writes: may it be written, and the files that grow or appear there.

config.yaml  per_step_metrics.csv  summary.txt  loss.png  report.html  + the Hugging Face checkpoint
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from apps.training.checkpointing.manifest import checkpoint_folders
from apps.training.files import atomic_path, nearest_existing, require_writable
from apps.training.memory import gibibytes
from apps.training.reporting.records import StepRecord
from backends.errors import UserError

METRICS = "per_step_metrics.csv"
RUN_FILES = ("config.yaml", METRICS, "summary.txt", "loss.png", "report.html")
CHECKPOINT_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", "pytorch_model*")
COLUMNS = (
    "Tokens in Step",
    "Step Loss",
    "Learning Rate",
    "Time per Step",
    "Step",
    "Epoch",
    "Counted Tokens",
    "Gradient Norm",
    "Tokens per Second",
    "Objective",
    "Skipped",
)


def require_free(folder: Path, *, overwrite: bool, unfinished: bool = False, checkpoints: Path | None = None) -> None:
    """UserError when `folder` holds another run or a checkpoint (unless `overwrite`), or cannot be written.

    `unfinished`: a run that was killed before it left weights there may be replaced. `checkpoints`: where that run's
    checkpoints would lie. Leaves nothing behind, also no folder that was not there.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise UserError(f"training.output_dir={folder} is a file. Expected a folder, or a name that is free.")
    names = CHECKPOINT_FILES if unfinished else (*RUN_FILES, *CHECKPOINT_FILES)
    taken = sorted({path.name for name in names for path in folder.glob(name)})
    if taken and not overwrite:
        saved = checkpoints is not None and not unfinished and checkpoint_folders(checkpoints)
        ways = "Choose another folder, or replace it with training.overwrite_output_dir=true."
        if saved:
            ways = (
                f"Go on with it by training.resume=auto: {checkpoints} holds its checkpoints. Or choose another "
                "folder, or replace the run and its checkpoints with training.overwrite_output_dir=true."
            )
        found = f"{', '.join(taken[:3])}{' …' if len(taken) > 3 else ''}"
        raise UserError(f"training.output_dir={folder} holds another run ({found}). {ways}")
    require_writable(folder, "training.output_dir")


def require_room(folder: Path, checkpoint_bytes: int, setting: str = "training.output_dir") -> None:
    """UserError when the disk has no room for the checkpoint: better now than after the last step."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < checkpoint_bytes:
        raise UserError(
            f"The checkpoint takes about {gibibytes(checkpoint_bytes)}, the disk of {setting}={folder} has "
            f"{gibibytes(free)} free. Make room, or choose another folder."
        )


def start_run(folder: Path, settings: str) -> None:
    """Make the folder, take away another run's metrics and reports, and write the effective settings as config.yaml.

    An old checkpoint stays until the new one replaces it: it may be what this run started from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
    with atomic_path(folder / "config.yaml") as path:
        path.write_text(settings, encoding="utf-8")


class MetricsFile:
    """per_step_metrics.csv, one row a step in plain numbers, handed to the system at once: a crash loses none.

    `resumed`: the steps before those to come. The file then holds exactly their rows, whatever a run that was killed
    had written behind them. A full disk ends no run: rows without room wait for the next ones, see `complaint`.
    """

    def __init__(self, path: Path, resumed: Sequence[StepRecord] = ()) -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(_line(row) for row in (COLUMNS, *map(_row, resumed))))
        self.path = path
        self.file = path.open("ab", buffering=0)
        self.waiting: deque[bytes] = deque()
        self._has_failed = False
        self._complaint: str | None = None

    def append(self, record: StepRecord) -> None:
        self.waiting.append(_line(_row(record)))
        self._write_waiting()

    def complaint(self) -> str | None:
        """What has gone wrong since one last asked: the first row without room, and what is missing after `close`."""
        complaint, self._complaint = self._complaint, None
        return complaint

    def close(self) -> None:
        self._write_waiting()
        if self.waiting:
            self._complaint = f"warning: '{self.path}' lacks its last {len(self.waiting)} rows: there is no room."
        try:
            self.file.close()
        except OSError as error:  # a file system that tells late
            self._complaint = f"warning: '{self.path}' may lack rows: {error.strerror}."

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_waiting(self) -> None:
        """Rows in their order, as many as there is room for; never a part of one."""
        end = self.file.tell()
        try:
            while self.waiting:
                rest = self.waiting[0]
                while rest:
                    rest = rest[self.file.write(rest) :]
                end += len(self.waiting.popleft())
        except OSError as error:
            if not self._has_failed:
                reason = f"Cannot write '{self.path}': {error.strerror}"
                self._complaint = f"warning: {reason}. The run goes on; rows are added when there is room again."
            self._has_failed = True
            with suppress(OSError):
                self.file.truncate(end)
                self.file.seek(end)


def _line(row: Sequence[object]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue().encode()


def _row(record: StepRecord) -> tuple[object, ...]:
    return (
        record.num_tokens,
        record.loss,
        float(f"{record.lr:.10g}"),
        round(record.seconds, 6),
        record.step,
        record.epoch,
        record.num_counted,
        "" if record.grad_norm is None else record.grad_norm,
        round(record.tokens_per_second, 1),
        "" if record.objective is None else record.objective,
        record.skipped,
    )
