"""A worker's line to the watch: it says twice a second what the worker is at, and hears when the job has to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from apps.training.workers.watch import BEAT, FAREWELL
from backends.errors import UserError

AFTER_THE_FIRST = 0.2  # seconds: worker 0's exit code is the job's, not that of a worker its launcher kills
LONGEST_TRACE = 32_000  # characters of a traceback


class Lifeline:
    """One worker's connection; a thread keeps it up until `leave` or the end of the job.

    `host` is the address of worker 0 under which it was reached.
    """

    def __init__(self, addresses: Sequence[tuple[str, int]], token: str, *, rank: int, timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.progress, self.what, self.waiting = 0, "starting", False
        self.link = _connect(addresses)
        self.host: str = self.link.getpeername()[0]
        self.lock = threading.Lock()
        self.over = threading.Event()
        self._send(token=token, rank=rank, host=socket.gethostname(), machine=machine(), pid=os.getpid())
        threading.Thread(target=self._keep_up, name="lifeline", daemon=True).start()

    def at(self, what: str, *, waiting: bool) -> None:
        """What this worker is at, from now on; `waiting`: for others. Costs nothing: the thread sends it."""
        self.what, self.waiting = what, waiting
        self.progress += 1

    def leave(self) -> None:
        """Say farewell and wait for everybody's: a launcher may end the job as soon as one worker has ended."""
        self.at("done", waiting=True)
        self._send(left=True)
        self.over.wait()

    def linger(self, seconds: float = 5.0) -> None:
        """Wait until worker 0, which has the last word on stdout, has ended."""
        if self.rank != 0:
            with suppress(OSError):
                self.link.settimeout(seconds)
                while self.link.recv(1 << 12):
                    pass

    def fail(self, line: str, trace: str, code: int, *, said: bool = False) -> NoReturn:
        """Report why this worker cannot go on; the watch says it, once for the whole job, and then ends all workers.

        `said`: the user has read it already.
        Nothing is torn down before: a broken connection would make others fail with a misleading reason.
        """
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        self._send(failure={"line": line, "trace": trace[-LONGEST_TRACE:], "code": code, "said": said})
        time.sleep(20)
        end_now(code)  # nobody answered

    def _send(self, **message: Any) -> None:
        with self.lock, suppress(OSError):  # a lost watch is noticed by the thread
            self.link.sendall(json.dumps(message).encode() + b"\n")

    def _keep_up(self) -> None:
        """Beat, and read what the watch says. Runs in the thread; ends the process when the job has to end."""
        buffer, unheard, next_beat = b"", 0, 0.0
        while not self.over.is_set():
            now = time.monotonic()
            if now >= next_beat:
                self._send(progress=self.progress, what=self.what, waiting=self.waiting)
                unheard += 1  # counted, not timed: this process may have been stopped for a while
                next_beat = now + BEAT
            self.link.settimeout(max(next_beat - now, 0.01))
            try:
                data = self.link.recv(1 << 16)
            except TimeoutError:
                if unheard * BEAT > self.timeout + FAREWELL:
                    self._lost_contact()
                continue
            except OSError:
                data = b""
            if not data:
                self._lost_contact()
            unheard = 0
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._obey(json.loads(line))

    def _obey(self, message: dict[str, Any]) -> None:
        if "over" in message:
            self.over.set()
        if "end" in message:
            for where, pid in message["kill"]:
                if where == machine() and pid != os.getpid():
                    with suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
            if self.rank != 0:
                time.sleep(AFTER_THE_FIRST)
            end_now(message["end"])

    def _lost_contact(self) -> NoReturn:
        """Worker 0's host is gone, and with it the watch. One worker speaks."""
        time.sleep(0.0 if self.rank == 1 else 2.0)
        if self.rank <= 1:
            text = (
                f"error: Worker {self.rank} ({socket.gethostname()}) has lost worker 0 ({self.host}); at: {self.what}."
            )
            print(text, file=sys.__stderr__, flush=True)
        end_now(1)


def end_now(code: int) -> NoReturn:
    """End this process at once, whatever its threads are blocked in; only what was printed is written out first."""
    flush = threading.Thread(target=_flush, daemon=True)  # the main thread may hold a stream's lock
    flush.start()
    flush.join(0.5)
    os._exit(code)


def machine() -> str:
    """A name for where a process id means the same process: this kernel since its start, and the process namespace."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}:{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


def _connect(addresses: Sequence[tuple[str, int]]) -> socket.socket:
    reasons = []
    for address in addresses:
        try:
            link = socket.create_connection(address, timeout=10)
        except OSError as error:
            reasons.append(f"{address[0]}:{address[1]}: {error}")
        else:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return link
    raise UserError(
        f"Worker 0 cannot be reached at {', '.join(reasons)}. Open the hosts to one another, or set MASTER_ADDR and "
        "MASTER_PORT to an address of worker 0's host."
    )
