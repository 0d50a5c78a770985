"""How long a sweep will still take: the work left, at the pace of the work done since it was started."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence

STEP = re.compile(r"Epoch \[(\d+)/(\d+)\], Step \[(\d+)/(\d+)\], Loss: (\S+),")


class Pace:
    """`work` of each run, in any unit, as far as it is known beforehand. `clock` in seconds."""

    def __init__(self, work: Sequence[float], clock: Callable[[], float] = time.monotonic) -> None:
        self.left, self.clock = list(work), clock
        self.done = 0.0
        self.started = clock()
        self._now, self._shares = -1, (0.0, 0.0)

    def begin(self, run: int) -> None:
        """Run number `run` starts, perhaps not from its first step."""
        self._now, self._shares = run, (-1.0, 0.0)

    def at(self, share: float) -> None:
        """So much of the running run is done, of 1; where it began is the first share told."""
        first = share if self._shares[0] < 0 else self._shares[0]
        self._shares = (first, share)

    def end(self) -> None:
        """The running run is over: nothing of it is left, and what it did counts."""
        first = max(self._shares[0], 0.0)
        self.done += self.left[self._now] * (1.0 - first)
        self.left[self._now] = 0.0
        self._now, self._shares = -1, (0.0, 0.0)

    def remaining(self) -> float | None:
        """Seconds left; None while there is nothing to judge by."""
        running = self.left[self._now] if self._now >= 0 else 0.0
        first, last = self._shares
        done = self.done + running * (last - max(first, 0.0))
        left = sum(self.left) - running * last
        return None if done <= 0 else (self.clock() - self.started) / done * left


def share_of_run(line: str) -> tuple[float, str] | None:
    """Of a step's line: the share of the run that is done, as far as epochs are equally long, and its loss."""
    found = STEP.search(line)
    if found is None:
        return None
    epoch, epochs, step, steps = (int(number) for number in found.groups()[:4])
    return (epoch - 1 + step / steps) / epochs, found[5]
