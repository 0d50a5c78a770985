"""The corpus every machine has: the Python standard library's own sources, one file a document (PSF licence).

Left out: tests, generated tables (the code pages in `encodings`, files about this build of Python) and lib2to3, which
newer versions dropped. What remains is about 10 MB of code and prose. It still differs between Python versions, so a
dataset made from it records a sha256.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from backends.errors import UserError

NAME = "corpus"  # what `input=` takes
_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "encodings", "lib2to3", "site-packages", "dist-packages"}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-", "__phello__")


def files() -> list[Path]:
    """The corpus' files, in an order that is the same on every machine with this Python version."""
    root = folder()
    found = sorted((path for path in root.rglob("*.py") if _belongs(path.relative_to(root))), key=Path.as_posix)
    if not found:
        raise UserError(
            f"This Python has no sources of its standard library in '{root}'. Give a text of yours: input=…"
        )
    return found


def folder() -> Path:
    """Where the standard library lies."""
    return Path(sysconfig.get_path("stdlib"))


def _belongs(path: Path) -> bool:
    return not _LEFT_OUT_FOLDERS.intersection(path.parts) and not any(
        part.startswith(_LEFT_OUT_PREFIXES) for part in path.parts
    )
