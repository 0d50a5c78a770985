"""Folders that change their names at one moment, and what is on the disk for certain. Imports no torch."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
from pathlib import Path

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
_UNKNOWN = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


def exchange(one: Path, other: Path) -> None:
    """Swap two existing names on one file system: whoever is killed at any moment leaves both there.

    Where the system cannot do that, `other` is missing for the moment between two renames. Raises OSError.
    """
    try:
        if _LIBC.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
    except AttributeError:  # a C library without it
        code = errno.ENOSYS
    if code not in _UNKNOWN:
        raise OSError(code, os.strerror(code), str(other))
    aside = other.parent / f".old-{secrets.token_hex(4)}-{other.name}"
    os.rename(other, aside)
    try:
        os.rename(one, other)
    except BaseException:
        os.rename(aside, other)
        raise
    os.rename(aside, one)


def sync(path: Path) -> None:
    """Wait until the file's content (or the folder's entries) are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_LIBC = ctypes.CDLL(None, use_errno=True)
