"""A progress line with an ETA: one live line on a terminal, a plain line every ten seconds in a log file."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, TextIO

LIVE_INTERVAL = 0.1  # seconds between redraws on a terminal
PLAIN_INTERVAL = 10.0  # seconds between lines elsewhere
CLEAR = "\r\x1b[2K"


class Progress:
    """Shows `label done/total unit  %  ETA  name value …` on stderr. Also a context manager that closes itself.

    `total` may be None when the end is not known. `mode`: "auto" draws a live line on a terminal and a line every ten
    seconds elsewhere, "on" draws the live line anywhere, "off" shows nothing.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        unit: str = "",
        *,
        mode: Literal["auto", "on", "off"] = "auto",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.unit = total, label, unit
        self.stream = sys.stderr if stream is None else stream
        self.live = mode == "on" or (mode == "auto" and self.stream.isatty())
        self.silent = mode == "off"
        self.clock = clock
        self.done = 0
        self.fields: dict[str, object] = {}
        self.started = self.last_shown = clock()
        self.recent: deque[tuple[float, int]] = deque([(self.started, 0)], maxlen=64)  # (time, done) when shown
        self.line_is_up = False

    def update(self, n: int = 1, **fields: object) -> None:
        """Count `n` more done and show it when the last showing is old enough. `fields` go to the line's end."""
        self.done += n
        self.fields.update(fields)
        now = self.clock()
        if now - self.last_shown >= (LIVE_INTERVAL if self.live else PLAIN_INTERVAL):
            self._show(now)

    def show(self, done: int, total: int) -> None:
        """Show `done` of `total`: a callback for work that counts by itself."""
        self.total = total
        self.update(done - self.done)

    def write(self, line: str, stream: TextIO | None = None) -> None:
        """Print `line` (to stdout) without tearing the live line."""
        self.clear()
        print(line, file=sys.stdout if stream is None else stream, flush=True)

    def close(self) -> None:
        """Take the live line down; a line that was worth showing is left as the last word."""
        now = self.clock()
        worth_showing = now - self.started >= (1.0 if self.live else PLAIN_INTERVAL)
        self.clear()
        if worth_showing and not self.silent:
            print(self._line(now, finished=True), file=self.stream, flush=True)
        self.silent = True

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, now: float) -> None:
        if self.silent:
            return
        self.last_shown = now
        self.recent.append((now, self.done))
        line = self._line(now)
        if self.live:
            width = shutil.get_terminal_size((120, 24)).columns
            self.stream.write(CLEAR + line[: width - 1])
            self.line_is_up = True
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def clear(self) -> None:
        """Take the live line down until the next update, so that something else may use the line."""
        if self.line_is_up:
            self.stream.write(CLEAR)
            self.stream.flush()
            self.line_is_up = False

    def _line(self, now: float, finished: bool = False) -> str:
        unit = f" {self.unit}" if self.unit else ""
        parts = [f"{self.label} {self.done:,}{f'/{self.total:,}' if self.total is not None else ''}{unit}"]
        if finished:
            parts.append(f"in {clock_time(now - self.started)}")
        elif self.total:
            parts.append(f"{min(self.done / self.total, 1.0):4.0%}")
            parts.append(f"ETA {self._remaining(now)}")
        parts += [f"{name.replace('_', ' ')} {value}" for name, value in self.fields.items()]
        return "  ".join(parts)

    def _remaining(self, now: float) -> str:
        """Time left at the pace of the last 64 showings: a slow first step must not spoil it for hours."""
        then, done_then = self.recent[0]
        if self.done <= done_then or self.total is None:
            return "–:––"
        return clock_time((now - then) / (self.done - done_then) * max(self.total - self.done, 0))


def clock_time(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
