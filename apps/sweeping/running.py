"""Starting train_llm as a process of its own: its output in a log and handed on line by line, Ctrl-C passed on once."""

from __future__ import annotations

import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import apps
from apps.training.cli import INTERRUPTED
from backends.errors import UserError

TRAIN_LLM = Path(next(iter(apps.__path__))) / "train_llm.py"
POLL = 0.1  # seconds until a Ctrl-C is noticed
PATIENCE = 10.0  # seconds for a run that was told twice to stop
RAISED = re.compile(r"^[\w.]*(Error|Exception|Interrupt)\b")


class Runner(Protocol):
    """Runs `words` until their end and returns the exit code; `on_line` gets what they print."""

    def __call__(
        self, words: Sequence[str], log: Path, *, on_line: Callable[[str], None], stop: Callable[[], bool]
    ) -> int: ...


class LastError:
    """The line that says why a program failed: its last `error: …`, or how its traceback ends, or its last line."""

    def __init__(self) -> None:
        self.error = self.raised = self.last = ""

    def see(self, line: str) -> None:
        """Look at one more line of output."""
        text = line.strip()
        if text.startswith("error: "):
            self.error = text.removeprefix("error: ")
        elif RAISED.match(text):
            self.raised = text
        self.last = text or self.last

    def line(self, code: int) -> str:
        """What to say of the exit code."""
        said = self.error or self.raised or self.last or "it printed nothing"
        if code < 0:
            return f"ended by {signal.Signals(-code).name}; last line: {self.last or 'none'}"
        return said if self.error else f"exit code {code}; {said}"


def train_words(command: str, arguments: Sequence[str], launcher: str | None = None) -> list[str]:
    """The command line of train_llm, behind the launcher's words."""
    return [*launcher_words(launcher), sys.executable, str(TRAIN_LLM), f"command={command}", *arguments]


def launcher_words(launcher: str | None) -> list[str]:
    """The launcher as words; UserError for an open quote."""
    try:
        return shlex.split(launcher or "")
    except ValueError as error:
        raise UserError(f"Cannot read launcher={launcher}: {error}. Expected words as in 'mpirun -np 2'.") from None


def run_process(words: Sequence[str], log: Path, *, on_line: Callable[[str], None], stop: Callable[[], bool]) -> int:
    """The Runner. The process gets a session of its own: a terminal's Ctrl-C reaches it once, from here.

    When `stop` becomes true it is interrupted, may finish and save, and counts as interrupted whatever its launcher
    made of the exit code. KeyboardInterrupt (a second Ctrl-C) ends it for good.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        print(f"$ {shlex.join(words)}", file=file, flush=True)
        try:
            process = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                text=True, encoding="utf-8", errors="replace", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UserError(f"Cannot start {words[0]}: {error.strerror}. Expected a program on the PATH.") from None
        assert process.stdout is not None
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
        try:
            was_told = _hand_on(process, lines, file, on_line, stop)
        except BaseException:
            _end(process)
            raise
    code = process.wait()
    return INTERRUPTED if was_told and code else code


def _read(stream: IO[str], lines: queue.SimpleQueue[str | None]) -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def _hand_on(
    process: subprocess.Popen[str],
    lines: queue.SimpleQueue[str | None],
    log: IO[str],
    on_line: Callable[[str], None],
    stop: Callable[[], bool],
) -> bool:
    """Until the output ends; returns whether the process was told to stop."""
    told = False
    while True:
        if stop() and not told:
            told = True
            process.send_signal(signal.SIGINT)
        try:
            line = lines.get(timeout=POLL)
        except queue.Empty:
            if process.poll() is not None and lines.empty():
                return told  # something it left behind may hold its output open
            continue
        if line is None:
            return told
        log.write(line)
        log.flush()
        on_line(line)


def _end(process: subprocess.Popen[str]) -> None:
    """Interrupt it once more, then kill it with everything it started."""
    until = time.monotonic() + PATIENCE
    process.send_signal(signal.SIGINT)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(POLL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
