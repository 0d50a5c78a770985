"""Files and folders that are either complete or not there.

Everything is first written under a hidden temporary name in the same parent folder (so that the final rename stays on
one file system), flushed to the disk, then renamed. A crash, Ctrl-C or full disk never leaves half a file under the
real name, and never touches what lay there before. A folder that cannot be renamed, a mounted volume for example, is
filled instead, from a hidden folder inside: modelzoo/folder_filling.py says what a crash can leave there.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backends.errors import UserError
from modelzoo.folder_exchange import exchange, sync
from modelzoo.folder_filling import CANNOT_MOVE, fill, holds_mount, remove_folder, temporary_name

_FULL_OR_READ_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; write one file there, and it appears as `path` when the block ends without an exception.

    The temporary name keeps the suffix of `path`, so writers that choose a format by suffix work. Missing parents are
    made. On an exception the temporary file and the parents made are removed and `path` is as before.
    Raises UserError when the place cannot be written or the disk is full.
    """
    target = Path(path).resolve()
    with _written_beside(target) as temporary:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder; fill it, and it appears as `path` when the block ends without an exception.

    A folder at `path` that is not empty is refused with UserError before the block runs, unless `overwrite`: then the
    old folder stays until the new one is complete, and is removed after the exchange.
    """
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"'{path}' is a file, but a folder is to be written there. Remove it or name another folder.")
    if not overwrite:
        _refuse_filled(target)
    elif target.exists() and any(holds_mount(entry) for entry in target.iterdir()):
        raise UserError(f"Something is mounted inside '{path}', which is to be replaced. Choose another folder.")
    with _written_beside(target) as temporary:
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        if not overwrite:
            _refuse_filled(target, ours=temporary)  # somebody else may have been quicker
        _exchange(temporary, target)
        sync(temporary.parent)


def is_filled(folder: Path) -> bool:
    """Whether `folder` exists and holds anything."""
    return folder.is_dir() and any(folder.iterdir())


def require_writable(folder: Path, setting: str) -> None:
    """UserError when `folder`, or the nearest folder above it that exists, takes no file. Leaves nothing behind.

    Tried, not asked: permission bits say nothing of a read-only disk or a system folder, and nothing at all to root.
    """
    existing = nearest_existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(
            f"Cannot write {setting}={folder}: {error.strerror} ({existing}). Choose another folder."
        ) from None


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the first above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if os.path.exists(place))


def make_parents(folder: Path, made: list[Path]) -> None:
    """mkdir -p, noting in `made` what was not there."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    for place in reversed(missing):
        place.mkdir(exist_ok=True)
        made.append(place)


def _refuse_filled(folder: Path, ours: Path | None = None) -> None:
    if folder.is_dir() and any(entry != ours for entry in folder.iterdir()):
        raise UserError(f"The folder '{folder}' is not empty. Name another folder.")


@contextmanager
def _written_beside(target: Path) -> Iterator[Path]:
    """Yield a free hidden name beside `target` (inside, where it is a folder that cannot move).

    Tidies up on failure, and turns errors of the place into UserErrors.
    """
    temporary = temporary_name(target)
    made: list[Path] = []
    try:
        make_parents(target.parent, made)
        os.scandir(temporary.parent).close()  # complains when it is a file
        yield temporary
    except BaseException as error:
        _remove(temporary)
        for folder in reversed(made):
            with suppress(OSError):  # somebody else wrote there meanwhile
                folder.rmdir()
        if isinstance(error, OSError) and _is_about(error, target, temporary):
            reason = f"Cannot write '{target}': {error.strerror} ({error.filename or temporary.parent})."
            raise UserError(f"{reason} Make room, or choose another place.") from error
        raise


def _is_about(error: OSError, target: Path, temporary: Path) -> bool:
    """Whether the error tells of the place written to, rather than of some input the block was reading."""
    if error.errno in _FULL_OR_READ_ONLY:
        return True
    named = Path(str(error.filename)) if error.filename is not None else None
    return named is not None and (named == target or named in target.parents or temporary in (named, *named.parents))


def _exchange(new: Path, target: Path) -> None:
    """Move the complete folder `new` to `target`; what was there is removed afterwards."""
    if not target.exists():
        os.rename(new, target)
        return
    old = [entry for entry in target.iterdir() if entry != new]
    if new.parent == target:
        fill(new, target, old)
        return
    try:
        exchange(new, target)
    except OSError as error:
        if error.errno not in CANNOT_MOVE:
            raise
        fill(new, target, old)
        return
    remove_folder(new)


def _remove(path: Path) -> None:
    """Remove what was half written, as far as it can be: the error that led here matters more."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
