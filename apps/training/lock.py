"""One run a folder: a second one is told who is there. Imports no torch."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from apps.training.files import make_parents
from backends.errors import UserError
from modelzoo.folder_filling import remove_leftovers

LOCK = ".lock"


@contextmanager
def locked(folders: Mapping[str, Path]) -> Iterator[None]:
    """Hold the folders (by the setting that names them) for this process until the block ends, or the process does.

    Makes the folders; those still empty at the end are removed again. Takes away what a run that was killed while it
    saved its model or adapter left half written. Raises UserError when another run holds one.
    """
    distinct: dict[Path, str] = {}
    for setting, folder in folders.items():
        distinct.setdefault(folder.resolve(), setting)
    with ExitStack() as held:
        for folder, setting in distinct.items():
            held.enter_context(_locked(folder, setting))
        yield


@contextmanager
def _locked(folder: Path, setting: str) -> Iterator[None]:
    made: list[Path] = []
    path = folder / LOCK
    try:
        make_parents(folder, made)
        descriptor = _take(path, setting)
    except BaseException as error:
        _remove_empty(made)
        if isinstance(error, OSError):
            raise UserError(f"Cannot write {setting}={folder}: {error.strerror}. Choose another folder.") from error
        raise
    try:
        for saved in (folder, folder / "adapter"):
            remove_leftovers(saved)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: nobody can be waiting for a file that is gone, see `_take`
        os.close(descriptor)
        _remove_empty(made)


def _take(path: Path, setting: str) -> int:
    """The lock file's descriptor, locked, with our name in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
            os.close(descriptor)  # its holder removed it meanwhile: there is a new one, or none
        except BlockingIOError:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"{setting}={path.parent} is in use by another run ({holder}). Wait for it, or choose another folder."
            ) from None
        except BaseException:
            os.close(descriptor)
            raise


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that lies there now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):  # not empty
            folder.rmdir()
