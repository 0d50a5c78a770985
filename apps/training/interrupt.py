"""Ctrl-C that lets the running step finish: the first is a request, the second is meant."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

ONE_PRESS = 0.5  # seconds: a launcher hands on the Ctrl-C that the terminal has already given to everybody


class StopRequest:
    """While it is entered, the first Ctrl-C sets `requested` and says so; the second raises KeyboardInterrupt.

    SIGTERM and SIGUSR1, with which launchers and schedulers announce the end of a job, are the same request; they
    never raise.
    """

    def __init__(self) -> None:
        self.requested = False
        self._pressed = 0.0
        self._previous: dict[int, Any] = {}

    def asked(self) -> bool:
        """`requested`, as a function to ask later."""
        return self.requested

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere Ctrl-C is somebody else's business.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested:
            if number == signal.SIGINT and now - self._pressed > ONE_PRESS:
                raise KeyboardInterrupt
            return
        self.requested, self._pressed = True, now
        text = "\nCtrl-C: finishing this step, then saving. Once more to stop at once."
        if number != signal.SIGINT:
            text = f"\n{signal.Signals(number).name}: finishing this step, then saving."
        print(text, file=sys.stderr, flush=True)
