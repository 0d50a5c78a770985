"""Which checkpoints of a folder are complete: those whose manifest agrees with every file. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from backends.errors import UserError

MANIFEST, STATE, METRICS = "manifest.json", "state.json", "metrics.csv"
FOLDER = "checkpoints"  # in a run's output folder, unless it says another
FORMAT = 1
_NAME = re.compile(r"iter_(\d+)$")


def step_of(folder: Path) -> int | None:
    """The step that a folder named iter_STEP holds; None for any other name."""
    found = _NAME.match(folder.name)
    return int(found[1]) if found else None


def checkpoint_folders(folder: Path) -> list[Path]:
    """The iter_STEP folders in `folder`, complete or not, the latest step first."""
    found = {entry: step_of(entry) for entry in folder.iterdir() if entry.is_dir()} if folder.is_dir() else {}
    return sorted((entry for entry, step in found.items() if step is not None), key=lambda each: -(step_of(each) or 0))


def newest_complete(folder: Path) -> Path | None:
    """The complete checkpoint of the latest step in `folder`, every byte checked; others are named on stderr."""
    for candidate in checkpoint_folders(folder):
        reason = flaw(candidate)
        if reason is None:
            return candidate
        print(f"warning: skipping checkpoint {candidate}: {reason}", file=sys.stderr, flush=True)
    return None


def complete_checkpoint(path: Path) -> Path:
    """`path` itself when it is a complete checkpoint, or the newest complete one in it. Raises UserError."""
    if (path / MANIFEST).exists() or (step_of(path) is not None and path.is_dir() and not checkpoint_folders(path)):
        reason = flaw(path)
        if reason is not None:
            raise UserError(f"The checkpoint {path} is not complete: {reason} Load another one.")
        return path
    found = newest_complete(path)
    if found is None:
        there = "holds no complete checkpoint (iter_STEP)" if path.is_dir() else "is not there"
        inside = f" Did you mean {path / FOLDER}?" if checkpoint_folders(path / FOLDER) else ""
        raise UserError(
            f"checkpoint.load_path={path} {there}. Expected a folder written with checkpoint.save=true.{inside}"
        )
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises OSError when there is none and ValueError when it is no manifest."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError("no list of files")
    return manifest


def flaw(folder: Path, *, hashes: bool = True) -> str | None:
    """What keeps the checkpoint from being complete, as a sentence; None when nothing does.

    `hashes`: read every byte, in several threads; otherwise only compare sizes.
    """
    try:
        manifest = read_manifest(folder)
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this program reads {FORMAT}."
        files = {str(name): (int(facts["bytes"]), str(facts["sha256"])) for name, facts in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, its writing was cut short."
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})."
    return next(_flaws(folder, files, hashes), None)


def _flaws(folder: Path, files: dict[str, tuple[int, str]], hashes: bool) -> Iterator[str]:
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing."
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size:,} bytes, {MANIFEST} says {size:,}."
    if hashes:
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(_sha256, (folder / name for name in files))
            for (name, (_, expected)), actual in zip(files.items(), found, strict=True):
                if actual != expected:
                    yield f"{name} was altered: its sha256 is {actual[:12]}…, {MANIFEST} says {expected[:12]}…."


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"unreadable ({error.strerror})"
