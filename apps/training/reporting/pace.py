"""At most so many records a second: which ones are sent, which wait, and which are left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """The numbers of a step for the loggers; where not all can be sent, the more important ones are."""

    step: int
    values: dict[str, float]
    importance: int = 0


class Pace:
    """One report waits for its time. Of two, the less important is left out, and of equals the older."""

    def __init__(self, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.interval, self.clock = 1.0 / per_second, clock
        self.left_out = 0
        self._due = clock()
        self._waiting: Report | None = None

    def offer(self, report: Report) -> list[Report]:
        """The reports to send now, in the order of their steps."""
        if self._waiting is not None and self._waiting.step == report.step:
            importance = max(self._waiting.importance, report.importance)
            report = Report(report.step, self._waiting.values | report.values, importance)
            self._waiting = None
        sent = self._take()
        if self._waiting is None:
            self._waiting = report
            return sent + self._take()
        self.left_out += 1
        if report.importance >= self._waiting.importance:
            self._waiting = report
        return sent

    def last(self, sleep: Callable[[float], None] = time.sleep) -> list[Report]:
        """What still waits, when nothing more will come."""
        if self._waiting is not None:
            sleep(max(self._due - self.clock(), 0.0))
            self._due = self.clock()
        return self._take()

    def _take(self) -> list[Report]:
        now = self.clock()
        if self._waiting is None or now < self._due:
            return []
        sent, self._waiting, self._due = [self._waiting], None, now + self.interval
        return sent
