"""Folders that cannot change their names are given their new files one by one. Imports no torch.

A mounted volume, a folder with a mount inside, the one we work in, one below a folder that takes no new entry: nothing
complete can be written beside such a folder and then exchanged for it. What is new is completed and flushed inside,
under a hidden name, and then its files are moved to their places (`fill`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from backends.errors import UserError
from modelzoo.folder_exchange import sync

# A folder that was not known to be fixed, and turned out to be: renaming it says one of these.
CANNOT_MOVE = {errno.EBUSY, errno.EXDEV, errno.EPERM, errno.EACCES}
# Nobody reads a checkpoint, an adapter or a dataset without these: they are taken away first, and come last.
GATES = ("config.json", "adapter_config.json", "metadata.yaml")
PLAN = ".plan.json"
_LEFTOVER = r"\.(tmp|new)-[0-9a-f]{8}-"


def temporary_name(target: Path) -> Path:
    """A free hidden name for what shall become `target`: beside it, or inside where it is a folder that cannot move."""
    place = target if target.is_dir() and is_fixed(target) else target.parent
    return place / f".tmp-{secrets.token_hex(4)}-{target.name}"


def is_fixed(folder: Path) -> bool:
    """Whether the existing `folder`, a resolved path, has to keep its name."""
    if holds_mount(folder) or folder.stat().st_dev != folder.parent.stat().st_dev:
        return True
    with suppress(FileNotFoundError):  # our own working folder was removed
        if Path.cwd().is_relative_to(folder):
            return True
    try:
        with tempfile.TemporaryFile(dir=folder.parent):
            return False
    except OSError:
        return True


def holds_mount(path: Path) -> bool:
    """Whether something is mounted at or below the resolved `path`. os.path.ismount does not see bind mounts."""
    return any(point.is_relative_to(path) for point in mount_points(mount_table()))


def mount_points(table: str) -> list[Path]:
    """The mount points in the text of a mountinfo, see proc(5): spaces and the like are written as \\040."""
    fields = (line.split(" ") for line in table.splitlines())
    return [Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), each[4])) for each in fields]


def mount_table() -> str:
    try:
        return os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    except OSError:
        return ""


def fill(new: Path, target: Path, old: Iterable[Path]) -> None:
    """Put the entries of the complete, flushed folder `new` into `target`, in place of those of its entries in `old`.

    Whoever is killed at any moment leaves all that was there, or all that is new: until the rename to `.new-…` inside
    `target` nothing is touched, from then on the new files are all there, some under that name perhaps, and the next
    writer moves the rest (`finish_filling`). Not guaranteed, other than by an exchange: for that moment `target` has
    no config.json and the like, so that a reader finds no checkpoint; it never finds a mixture of two.
    Raises OSError.
    """
    going = sorted((path.name for path in old), key=lambda name: name not in GATES)
    coming = sorted((path.name for path in new.iterdir()), key=lambda name: name in GATES)
    for name in going:
        if holds_mount(target / name):
            raise OSError(errno.EBUSY, f"{os.strerror(errno.EBUSY)} ('{name}')", str(target))
    (new / PLAN).write_text(json.dumps({"going": going, "coming": coming}), encoding="utf-8")
    sync(new / PLAN)
    sync(new)
    ready = target / f".new-{secrets.token_hex(4)}-{target.name}"
    os.rename(new, ready)
    try:
        sync(target)
        _move_in(ready)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; what is missing is in '{ready}'", str(target)) from error


def finish_filling(target: Path) -> None:
    """Move the files to their places that a writer who was killed in `fill` left. Raises OSError."""
    for place in _leftovers(target, target, ".new"):
        _move_in(place)


def remove_leftovers(target: Path) -> None:
    """Take away what writers of `target` who were killed left beside it or inside. Only under its lock.

    UserError when a move into it that was begun cannot be finished.
    """
    try:
        finish_filling(target)
    except OSError as error:
        raise UserError(
            f"A save to '{target}' was cut short, and its files cannot be moved to their places: {error.strerror} "
            f"({error.filename}). Move them from its folder .new-… by hand, or choose another folder."
        ) from error
    for place in (target.parent, target):
        for folder in _leftovers(place, target, ".tmp"):
            remove_folder(folder)


def remove_folder(folder: Path) -> None:
    """Remove `folder`, if it is there and as far as it can be; one that something is mounted in is left alone."""
    if not holds_mount(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _leftovers(place: Path, target: Path, kind: str) -> list[Path]:
    """The folders in `place` under the names that `temporary_name` and `fill` make for `target`."""
    pattern = re.compile(_LEFTOVER + re.escape(target.name))
    found = []
    with suppress(OSError):  # there is no such folder, or one may not look into it
        found = [Path(entry) for entry in os.scandir(place) if entry.is_dir(follow_symlinks=False)]
    return [path for path in found if path.name.startswith(f"{kind}-") and pattern.fullmatch(path.name)]


def _move_in(ready: Path) -> None:
    """Move the entries of `ready` to the folder it lies in, as its plan says; nothing is done twice."""
    target = ready.parent
    if (ready / PLAN).exists():
        plan = json.loads((ready / PLAN).read_text(encoding="utf-8"))
        for name in plan["going"]:
            if name not in plan["coming"] or os.path.lexists(ready / name):  # otherwise it is the new one already
                delete(target / name)
        sync(target)
        for name in plan["coming"]:
            if name in GATES:
                sync(target)
            if os.path.lexists(ready / name):
                os.replace(ready / name, target / name)
        sync(target)
        (ready / PLAN).unlink()
    ready.rmdir()


def delete(path: Path) -> None:
    """Remove a file, a link or a whole folder; a name that is not there is fine. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
