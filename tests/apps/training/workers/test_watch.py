"""The watch as a process, spoken to as workers would."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from apps.training.workers.launch import Launch
from apps.training.workers.rendezvous import Meeting, open_watch

FIRST = Launch(0, 2, 0, 2, "mpich")


@contextmanager
def worker(meeting: Meeting, rank: int, token: str | None = None) -> Iterator[socket.socket]:
    with socket.create_connection((meeting.hosts[0], meeting.watch_port), timeout=10) as link:
        say(link, token=token or meeting.token, rank=rank, host=f"host{rank}", machine="another", pid=1)
        yield link


def say(link: socket.socket, **message: object) -> None:
    link.sendall(json.dumps(message).encode() + b"\n")


def hear(link: socket.socket, what: str) -> dict[str, object]:
    """The first message with that key."""
    for line in link.makefile():
        message: dict[str, object] = json.loads(line)
        if what in message:
            return message
    raise EOFError(what)


def test_a_lost_worker_is_said_and_the_others_are_told_to_end(capfd: pytest.CaptureFixture[str]) -> None:
    meeting = open_watch(FIRST, 60.0, "worker_timeout", None)
    with worker(meeting, 0) as first:
        with worker(meeting, 1) as second:
            say(second, progress=1, what="step 3", waiting=False)
            hear(second, "beat")
        assert hear(first, "end") == {"end": 1, "kill": []}
    assert capfd.readouterr().err == (
        "error: Worker 1 of 2 (host1, process 1) is gone without a word, as when it is killed or out of memory; "
        "last heard of at: step 3.\n"
    )


def test_workers_that_have_all_left_are_over_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    meeting = open_watch(FIRST, 60.0, "worker_timeout", None)
    with worker(meeting, 0) as first, worker(meeting, 1) as second:
        say(second, left=True)
        hear(second, "beat")
        say(first, left=True)
        assert hear(first, "over")
        assert hear(second, "over")
        first.close()
        assert second.makefile().read() == ""  # it stays until worker 0 has gone, and no longer
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "greeting", [b"GET / HTTP/1.1\r\n\r\n", b'{"token": "wrong", "rank": 1}\n', b"{}\n", b"[]\n", b'"x"\n']
)
def test_strangers_are_sent_away_and_change_nothing(greeting: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    meeting = open_watch(FIRST, 60.0, "worker_timeout", None)
    with worker(meeting, 0) as first, worker(meeting, 1) as second:
        with socket.create_connection((meeting.hosts[0], meeting.watch_port), timeout=10) as stranger:
            stranger.sendall(greeting)
            assert stranger.recv(100) == b""
        say(first, left=True)
        say(second, left=True)
        assert hear(first, "over")
    assert capfd.readouterr().err == ""
