"""The process that watches the workers and has the last word when one of them fails.

It stands beside worker 0, in a session of its own: a launcher that kills all workers at the first death (MPICH does,
within a millisecond) must not kill the one that tells the user why. It imports nothing but Python's own modules, so it
is up in 20 ms, and no stopped, hung or garbage-collecting worker holds it up.

Workers connect by TCP and send lines of JSON: a greeting, then twice a second what they are at, then a farewell or a
failure. It judges by `job.py`, says one thing on stderr, tells everybody to end, and kills who does not.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

if not __package__:  # started as a file, without the site packages
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from apps.training.workers.job import Job, Verdict

TICK = 0.1  # seconds
BEAT = 0.5
FAREWELL = 1.5  # seconds that workers have to end by themselves


class Connection:
    """One worker's line; `rank` is None until it has greeted with the job's token."""

    def __init__(self, link: socket.socket) -> None:
        self.link, self.buffer = link, b""
        self.rank: int | None = None

    def lines(self) -> list[dict[str, Any]] | None:
        """What came in; None at the end of the connection."""
        try:
            data = self.link.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            return None
        *complete, self.buffer = (self.buffer + data).split(b"\n")
        try:
            lines = [json.loads(line) for line in complete]
        except ValueError:
            return None  # a stranger
        return lines if all(isinstance(line, dict) for line in lines) else None

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # its end is seen when it is read
            self.link.sendall(json.dumps(message).encode() + b"\n")


class Watch:
    """The loop: reads every worker's lines into the job, and acts on the job's verdict."""

    def __init__(self, listener: socket.socket, job: Job, token: str) -> None:
        self.listener, self.job, self.token = listener, job, token
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(sys.stdin, selectors.EVENT_READ)  # ends when worker 0 does
        self.connections: dict[socket.socket, Connection] = {}
        self.is_orphan = False

    def run(self) -> None:
        """Until the job has ended, well or badly."""
        last, last_beat, said_over = time.monotonic(), 0.0, False
        while True:
            self.read(TICK)
            now = time.monotonic()
            self.job.advance(now - last)
            last = now
            verdict = self.job.verdict()
            if verdict is not None:
                return self.end(verdict)
            if self.is_orphan:
                return None
            if self.job.is_over:
                if not said_over:
                    self.tell({"over": True})
                    said_over = True
                if self.job.first_is_gone:  # the others stay until worker 0 has really ended: some launchers kill
                    return None
            elif now - last_beat >= BEAT:
                self.tell({"beat": True})
                last_beat = now

    def read(self, seconds: float) -> None:
        for key, _ in self.selector.select(seconds):
            if key.fileobj is self.listener:
                link, _ = self.listener.accept()
                link.settimeout(5)
                self.connections[link] = Connection(link)
                self.selector.register(link, selectors.EVENT_READ)
                continue
            if key.fileobj is sys.stdin:
                self.selector.unregister(sys.stdin)
                self.is_orphan = 0 not in self.job.workers
                continue
            connection = self.connections[key.fileobj]  # type: ignore[index]
            lines = connection.lines()
            for line in lines or ():
                if connection.rank is None:
                    if line.get("token") != self.token:
                        lines = None
                        break
                    connection.rank = line["rank"]
                self.job.hear(connection.rank, line)
            if lines is None:
                self.selector.unregister(connection.link)
                del self.connections[connection.link]
                connection.link.close()
                if connection.rank is not None:
                    self.job.lose(connection.rank)

    def tell(self, message: dict[str, Any]) -> None:
        for connection in list(self.connections.values()):
            if connection.rank is not None:
                connection.send(message)

    def end(self, verdict: Verdict) -> None:
        """Say it, once; then everybody ends."""
        if verdict.text:
            with suppress(OSError):  # nobody is left to read it
                sys.stderr.write(verdict.text + "\n")
                sys.stderr.flush()
        self.tell({"end": verdict.code, "kill": self.job.unresponsive()})
        deadline = time.monotonic() + FAREWELL
        while any(connection.rank is not None for connection in self.connections.values()):
            if time.monotonic() > deadline:
                break
            self.read(TICK)
        here = self.job.machine
        if 0 not in self.job.workers:
            kill(os.getppid())  # worker 0 waits in MPI for those who did not come
        for worker in self.job.workers.values():
            if worker.machine == here and not worker.gone:
                kill(worker.pid)


def kill(pid: int) -> None:
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """stdin: one line of JSON with token, number of workers, timeout in seconds, its setting, and this machine's name.

    The listening socket is inherited as file descriptor `fd`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    given = json.loads(sys.stdin.readline())
    job = Job(given["world_size"], timeout=given["timeout"], setting=given["setting"], machine=given["machine"])
    Watch(socket.socket(fileno=given["fd"]), job, given["token"]).run()


if __name__ == "__main__":
    main()
