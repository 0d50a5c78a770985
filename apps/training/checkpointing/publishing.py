"""From workers' files to one complete checkpoint, and away with the old ones.

Names in SAVE_PATH: `.tmp-iter_K` is being written, `iter_K` is complete, `.tmp-old-iter_K` is on its way out.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.training.checkpointing.manifest import FORMAT, MANIFEST, METRICS, STATE, checkpoint_folders, flaw, step_of
from apps.training.checkpointing.snapshot import Snapshot
from apps.training.checkpointing.tensor_file import FileFacts, write_file
from apps.training.reporting.records import Evaluation
from backends.errors import UserError
from modelzoo.folder_exchange import exchange, sync

BEING_WRITTEN, ON_ITS_WAY_OUT = ".tmp-", ".tmp-old-"
PATIENCE = 1800.0  # seconds for a worker whose share is late; one that died ends the whole job long before


class ShareFailed(RuntimeError):
    """Another worker could not write its share."""


class Publisher:
    """Folders, notes and manifests of the checkpoints in `folder`; one object a worker."""

    def __init__(self, folder: Path, rank: int, world_size: int, keep: int | None, static: Mapping[str, bytes]) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.keep, self.static = keep, static

    def begin(self, step: int) -> Path:
        """The folder this step's files go to; whichever worker comes first makes it."""
        place = self._place(step)
        place.mkdir(parents=True, exist_ok=True)
        return place

    def leave_note(self, step: int, facts: Mapping[str, FileFacts]) -> None:
        """Tell the first worker that this one's files are on the disk."""
        self._write_note(step, {"files": {name: asdict(each) for name, each in facts.items()}})

    def give_up(self, step: int, error: Exception) -> None:
        """Take away what was written of this step, and tell the first worker."""
        place = self._place(step)
        if self.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
            return
        for path in place.glob(f"*-{self.rank + 1:05}-of-*"):  # on a full disk this makes room for the note
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self._write_note(step, {"failed": str(error)})

    def write_texts(
        self, snapshot: Snapshot, state: Mapping[str, Any], evaluations: Sequence[Evaluation], metrics: str
    ) -> dict[str, FileFacts]:
        """Write all that is no tensor: configs and tokenizer, the weights' index, the state, the steps so far."""
        texts = dict(self.static)
        files = set(snapshot.weight_map.values())
        if len(files) > 1 and all(name.startswith("model-") for name in files):
            index = {"metadata": {"total_size": snapshot.weight_bytes}, "weight_map": snapshot.weight_map}
            texts["model.safetensors.index.json"] = _json(index)
        stored = {"step": snapshot.step, "world_size": self.world_size, "state": dict(state)}
        texts[STATE] = _json(stored | {"evaluations": [asdict(each) for each in evaluations]})
        texts[METRICS] = metrics.encode()
        place = self._place(snapshot.step)
        return {name: write_file(place / name, [content]) for name, content in texts.items()}

    def publish(self, step: int, facts: Mapping[str, FileFacts]) -> None:
        """With everybody's files there: manifest, then the name, then remove what `keep` leaves out."""
        place, target = self._place(step), self.folder / f"iter_{step}"
        files = {name: asdict(each) for name, each in facts.items()}
        for note in self._notes(step):
            files |= note
        manifest = {"format": FORMAT, "step": step, "world_size": self.world_size, "files": files}
        write_file(place / MANIFEST, [_json(manifest)])
        sync(place)
        if target.exists():  # broken, or this step's own, saved again
            exchange(place, target)
        else:
            os.rename(place, target)
        sync(self.folder)
        shutil.rmtree(place, ignore_errors=True)
        self._prune(step)

    def _prune(self, step: int) -> None:
        if self.keep is not None:  # otherwise all that ever were would be looked at behind each
            # A later one can only be damaged (see `require_no_later`): it must not push a good one out.
            ours = [each for each in checkpoint_folders(self.folder) if (step_of(each) or 0) <= step]
            complete = [each for each in ours if flaw(each, hashes=False) is None]
            for folder in complete[self.keep :]:
                remove_checkpoint(folder)
        for place in self.folder.glob(f"{BEING_WRITTEN}iter_*"):  # of a step that failed; nobody writes there any more
            if (step_of(Path(place.name.removeprefix(BEING_WRITTEN))) or step) < step:
                shutil.rmtree(place, ignore_errors=True)

    def _notes(self, step: int) -> Iterator[dict[str, Any]]:
        """What each other worker wrote, as soon as it says so. Raises ShareFailed."""
        deadline = time.monotonic() + PATIENCE
        for rank in range(1, self.world_size):
            path = self._note(step, rank)
            while not path.is_file():
                if time.monotonic() > deadline:
                    raise ShareFailed(f"worker {rank} has not written its share in {PATIENCE:.0f} s")
                time.sleep(0.02)
            note = json.loads(path.read_text(encoding="utf-8"))
            if "failed" in note:
                raise ShareFailed(f"worker {rank}: {note['failed']}")
            path.unlink()
            yield note["files"]

    def _write_note(self, step: int, note: Mapping[str, Any]) -> None:
        path = self._note(step, self.rank)
        temporary = path.with_suffix(".tmp")
        write_file(temporary, [_json(note)])
        os.replace(temporary, path)

    def _place(self, step: int) -> Path:
        return self.folder / f"{BEING_WRITTEN}iter_{step}"

    def _note(self, step: int, rank: int) -> Path:
        return self._place(step) / f"worker-{rank:05}.json"


def clean(folder: Path) -> None:
    """Remove what a killed run left half done in `folder`. Only under the folder's lock."""
    for name in (BEING_WRITTEN, ON_ITS_WAY_OUT):
        for place in folder.glob(f"{name}iter_*"):
            shutil.rmtree(place)


def require_no_later(folder: Path, step: int, *, overwrite: bool = False) -> None:
    """UserError when `folder` holds complete checkpoints of later steps than `step`, where we start (0: anew).

    They are of another run, or of a future given up; beside ours they would pass for the newest.
    """
    if overwrite:
        return
    later = [each.name for each in _later(folder, step) if flaw(each) is None]
    if later:
        start = f"goes on from step {step}" if step else "starts anew"
        raise UserError(
            f"checkpoint.save_path={folder} holds {later[0]}, and this run {start}. Choose another folder, go on from "
            f"{later[0]} (training.resume=auto), or remove what is there by training.overwrite_output_dir=true."
        )


def remove_later(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps than `step`, damaged ones too. Only under the folder's lock."""
    for each in _later(folder, step):
        remove_checkpoint(each)


def _later(folder: Path, step: int) -> list[Path]:
    return [each for each in checkpoint_folders(folder) if (step_of(each) or 0) > step]


def remove_checkpoint(folder: Path) -> None:
    """Remove a complete checkpoint; killed on the way, no half of it is left under its name."""
    old = folder.with_name(f"{ON_ITS_WAY_OUT}{folder.name}")
    os.rename(folder, old)
    shutil.rmtree(old, ignore_errors=True)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
