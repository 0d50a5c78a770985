"""Printing to nobody, to a closed terminal and to a full disk ends nothing."""

import os
import sys
from typing import TextIO

import pytest

from apps.training.lasting_output import lasting_output


def print_to(stream: TextIO, monkeypatch: pytest.MonkeyPatch) -> int:
    """Print a lot to `stream` under the guard, and once after it; return how often it said that its reader has gone."""
    gone: list[None] = []
    monkeypatch.setattr("sys.stdout", stream)
    with lasting_output(lambda: gone.append(None)):
        for _ in range(3):
            print("line", flush=True)
        print("unflushed " * 10_000)
        assert sys.stdout.fileno() == stream.fileno()
    assert sys.stdout is stream
    print("after", flush=True)
    return len(gone)


def test_a_pipe_without_reader_is_told_once_and_silent_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:
        assert print_to(pipe, monkeypatch) == 1


def test_a_closed_terminal_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under nohup and disown the run is meant to outlive it; without them SIGHUP comes too."""
    ours, theirs = os.openpty()
    os.close(ours)
    with open(theirs, "w", encoding="utf-8") as terminal:
        with pytest.raises(OSError, match="Input/output"):
            os.write(theirs, b"x")
        assert print_to(terminal, monkeypatch) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_log_on_a_full_disk_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        with pytest.raises(OSError, match="No space left"):
            os.write(full.fileno(), b"x")
        assert print_to(full, monkeypatch) == 0
