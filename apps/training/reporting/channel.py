"""A logger in a thread of its own: however slow it is, and whatever it raises, training goes on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from apps.training.loggers import RunLogger
from apps.training.reporting.pace import Report

MAX_WAITING = 10_000  # reports a logger may lag behind by before it is given up


class Channel:
    """Passes reports on to a logger, which the thread opens, uses and closes. The first failure is its last word."""

    def __init__(self, name: str, start: Callable[[], RunLogger]) -> None:
        self.name = name
        self._start = start
        self._failure: str | None = None
        self._is_told = False
        self._reports: queue.SimpleQueue[Report | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def send(self, report: Report) -> None:
        """Returns at once."""
        if self._failure is None and self._reports.qsize() >= MAX_WAITING:
            self._failure = f"it lags {MAX_WAITING} reports behind"
        if self._failure is None:
            self._reports.put(report)

    def complaint(self) -> str | None:
        """What has gone wrong, the first time one asks after it; None otherwise."""
        if self._failure is None or self._is_told:
            return None
        self._is_told = True
        return f"warning: logging to {self.name} failed, the run goes on without it: {self._failure}"

    def close(self, *, failed: bool, timeout: float = 60.0) -> None:
        """Let the logger finish what it has got, for so many seconds."""
        self._reports.put(failed)
        self._thread.join(timeout)
        if self._thread.is_alive() and self._failure is None:
            self._failure = f"it had not finished {timeout:g} s after the last step"

    def _work(self) -> None:
        try:
            logger = self._start()
            while isinstance(report := self._reports.get(), Report):
                logger.log(report.step, report.values)
            logger.close(failed=report)
        except (Exception, SystemExit) as error:  # of somebody else's package: anything
            lines = str(error).strip().splitlines()
            self._failure = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
