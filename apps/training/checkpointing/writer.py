"""One checkpoint after another, written by a thread while training goes on.

Every worker writes its share into SAVE_PATH/.tmp-iter_K and then a note with the hashes; the first worker's thread
waits for all notes (no collective: those belong to the training thread), writes the manifest, and only then gives the
folder its name. Older checkpoints are removed after that. A kill at any moment leaves the previous one as it was.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apps.training.checkpointing import step_rows
from apps.training.checkpointing.publishing import Publisher
from apps.training.checkpointing.shares import optimizer_file
from apps.training.checkpointing.snapshot import Copies, HasOptimizerState, Snapshot, take_snapshot
from apps.training.checkpointing.tensor_file import FileFacts, HostBytes, write_tensors
from apps.training.reporting.records import Evaluation, StepRecord
from backends.errors import UserError


class CheckpointWriter:
    """Writes worker `rank`'s share of checkpoints into `folder`, at most one at a time.

    `static`: small files that every checkpoint holds, by name (see `static_files`). `keep`: complete checkpoints that
    stay (None: all). `sharded_optimizer`: this worker's optimizer state is nobody else's (ZeRO-1).
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        world_size: int = 1,
        keep: int | None = None,
        static: Mapping[str, bytes] | None = None,
        sharded_optimizer: bool = False,
    ) -> None:
        self.folder = folder
        self.rank, self.world_size, self.is_sharded = rank, world_size, sharded_optimizer
        self._publisher = Publisher(folder, rank, world_size, keep, dict(static or {}))
        self._copies, self._host = Copies(), HostBytes()
        self._snapshot: Snapshot | None = None
        self._rows = [step_rows.header()]  # what metrics.csv holds so far
        self._num_rows = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failed_step = 0

    def prepare(self, nbytes: int, device: torch.device) -> None:
        """Make ready for checkpoints of about `nbytes`, before the first step: what takes the host a while."""
        if device.type == "cuda":
            self._host.prepare(nbytes)

    def snapshot(self, step: int, model: nn.Module, program: HasOptimizerState) -> None:
        """Copy what this worker saves of `step`: call it when the step's update is queued, before the next step.

        Waits for the checkpoint before to be written, whose memory it takes over; for nothing else.
        """
        assert self._snapshot is None, f"step {step} is saved before what was copied of the last one is written"
        self._join()
        self._snapshot = take_snapshot(
            step,
            model,
            program,
            self._copies,
            rank=self.rank,
            world_size=self.world_size,
            is_sharded=self.is_sharded,
        )

    def write(self, state: Mapping[str, Any], records: Sequence[StepRecord], evaluations: Sequence[Evaluation]) -> None:
        """Start writing the last snapshot, and return.

        `state`: what JSON can hold; `records`: every step from 1 to the snapshot's (later ones are left out), a list
        that only grows from call to call.
        """
        self._join()
        snapshot, self._snapshot = self._snapshot, None
        assert snapshot is not None, "write() needs a snapshot() first"
        if self.rank == 0:
            self._add_rows([record for record in records[self._num_rows :] if record.step <= snapshot.step])
        so_far = [each for each in evaluations if each.step <= snapshot.step]
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, dict(state), so_far), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is on its way to the disk."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until the last checkpoint is complete. Raises UserError when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise UserError(self._told(error)) from error

    def _join(self) -> None:
        """Wait for the thread; a failure costs that checkpoint only, the next one may find room again."""
        try:
            self.wait()
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)

    def _told(self, error: Exception) -> str:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return (
            f"The checkpoint of step {self._failed_step} was not saved in '{self.folder}': {reason}. "
            "Earlier ones are as they were. Make room, or set checkpoint.save_path to another place."
        )

    def _add_rows(self, records: Sequence[StepRecord]) -> None:
        self._rows.append(step_rows.rows(records))
        self._num_rows += len(records)

    def _run(self, snapshot: Snapshot, state: dict[str, Any], evaluations: list[Evaluation]) -> None:
        try:
            self._write(snapshot, state, evaluations)
        except Exception as error:  # told by the next call of the training thread
            self._failed_step = snapshot.step
            self._error = error
            self._publisher.give_up(snapshot.step, error)

    def _write(self, snapshot: Snapshot, state: dict[str, Any], evaluations: list[Evaluation]) -> None:
        if snapshot.event is not None:
            torch.cuda.set_device(snapshot.device)
            snapshot.event.synchronize()
        publisher = self._publisher
        folder = publisher.begin(snapshot.step)
        facts = self._write_share(folder, snapshot)
        if self.rank > 0:
            publisher.leave_note(snapshot.step, facts)
            return
        facts |= publisher.write_texts(snapshot, state, evaluations, "".join(self._rows))
        publisher.publish(snapshot.step, facts)

    def _write_share(self, folder: Path, snapshot: Snapshot) -> dict[str, FileFacts]:
        facts = {
            name: write_tensors(folder / name, tensors, self._host, {"format": "pt"})
            for name, tensors in snapshot.weights.items()
        }
        name = optimizer_file(self.rank, self.world_size)
        return facts | {name: write_tensors(folder / name, snapshot.own, self._host)}
