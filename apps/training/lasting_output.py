"""stdout and stderr that outlive their reader: what is printed ends no run in the middle of its work."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

_NOBODY_THERE = {errno.EPIPE, errno.EIO}  # a pipe whose reader has ended, a terminal that was closed


class LastingStream:
    """`stream`, but printing to it never fails. `on_reader_gone` is called when it turns out to be a pipe to nobody.

    On a full disk what is printed is lost, and later lines may find room again.
    """

    def __init__(self, stream: TextIO, on_reader_gone: Callable[[], None]) -> None:
        self._stream, self._on_reader_gone = stream, on_reader_gone

    def write(self, text: str) -> int:
        with self._going_on():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._going_on():
            self._stream.flush()

    def leave(self) -> None:
        """Whoever uses `stream` itself from now on, Python at its exit too, shall not meet the old failure."""
        try:
            self._stream.flush()
        except OSError:
            self._silence()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _NOBODY_THERE:
                self._silence()
            if error.errno == errno.EPIPE:
                self._on_reader_gone()

    def _silence(self) -> None:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output(on_reader_gone: Callable[[], None]) -> Iterator[None]:
    """Both streams as LastingStream while the block runs."""
    before = sys.stdout, sys.stderr
    lasting = [LastingStream(stream, on_reader_gone) for stream in before]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in lasting)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in lasting:
            stream.leave()
