"""Ctrl-C that lets the running step finish: the first is a request, the second is meant."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress
from types import FrameType, TracebackType
from typing import Any

from apps.training.lasting_output import lasting_output

ONE_PRESS = 0.5  # seconds: a launcher hands on the Ctrl-C that the terminal has already given to everybody


class StopRequest:
    """While it is entered, the first Ctrl-C sets `requested` and says so; the second raises KeyboardInterrupt.

    SIGTERM, SIGUSR1 and SIGHUP, with which launchers, schedulers and closed sessions announce the end of a job, are the
    same request; they never raise. SIGHUP that is ignored (`nohup`) stays so. A reader of our output that has gone
    (`| tee` hears Ctrl-C too) is the same request as well, and a print is no reason to end meanwhile.
    """

    def __init__(self) -> None:
        self.requested = False
        self._signalled: float | None = None
        self._previous: dict[int, Any] = {}
        self._output = ExitStack()

    def asked(self) -> bool:
        """`requested`, as a function to ask later."""
        return self.requested

    def request(self) -> None:
        """As a signal would, without a word; a first Ctrl-C may still come."""
        self.requested = True

    def __enter__(self) -> StopRequest:
        self._output.enter_context(lasting_output(self.request))
        # Python allows handlers in the main thread only; elsewhere Ctrl-C is somebody else's business.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._output.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signalled is not None:
            if number == signal.SIGINT and now - self._signalled > ONE_PRESS:
                raise KeyboardInterrupt
            return
        self.requested, self._signalled = True, now
        text = "\nCtrl-C: finishing this step, then saving. Once more to stop at once."
        if number != signal.SIGINT:
            text = f"\n{signal.Signals(number).name}: finishing this step, then saving."
        with suppress(RuntimeError):  # the signal came in the middle of another print
            print(text, file=sys.stderr, flush=True)
