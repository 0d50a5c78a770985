"""How a program ends: its exit code and what it leaves on stderr."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import pytest

from apps.training.cli import first_alone, run_main
from backends.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def raising(error: BaseException) -> Callable[[Sequence[str]], None]:
    def program(argv: Sequence[str]) -> None:
        raise error

    return program


def test_the_arguments_go_in_and_the_code_comes_out() -> None:
    assert run_main(lambda argv: len(argv), ["a", "b"]) == 2
    assert run_main(lambda argv: None, []) == 0


def test_a_user_error_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(raising(UserError("No such folder.")), []) == 2
    assert capsys.readouterr() == ("", "error: No such folder.\n")


def test_an_interrupt_is_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(raising(KeyboardInterrupt()), []) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(raising(ZeroDivisionError()), [])


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_a_place_the_system_refuses_is_one_line_and_code_2(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    reason = os.strerror(number)
    assert run_main(raising(OSError(number, reason, "/locked/x")), []) == 2
    assert capsys.readouterr().err == f"error: {reason}: '/locked/x'. Expected a place with room that you may use.\n"
    assert run_main(raising(OSError(number, reason)), []) == 2
    assert capsys.readouterr().err == f"error: {reason}. Expected a place with room that you may use.\n"
    with pytest.raises(OSError, match="Input/output"):
        run_main(raising(OSError(errno.EIO, os.strerror(errno.EIO))), [])


def test_a_reader_that_leaves_is_no_error() -> None:
    program = (
        "import sys\nfrom apps.training.cli import run_main\n"
        "sys.exit(run_main(lambda argv: print('line\\n' * 100_000)))"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_an_error_that_nobody_reads_keeps_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=1, encoding="utf-8") as pipe:
        monkeypatch.setattr("sys.stderr", pipe)
        assert run_main(raising(UserError("No such folder.")), []) == 2
        assert run_main(raising(KeyboardInterrupt()), []) == 130
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[BaseException]]]:
    """Makes this process a worker of two; what it would meet the others over is in the list."""
    met: list[BaseException] = []
    files = ExitStack()

    def fail(launch: object, error: BaseException) -> None:
        met.append(error)
        raise SystemExit(99)

    def opened(*given: Any, **how: Any) -> TextIO:
        return files.enter_context(open(*given, **how))

    def start(rank: int) -> list[BaseException]:
        for name, value in {"PMI_RANK": str(rank), "PMI_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("apps.training.workers.group.fail_before_opening", fail)
        monkeypatch.setattr("apps.training.cli.open", opened, raising=False)
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(f"sys.{stream}", getattr(sys, stream))
        return met

    with files:
        yield start


def test_a_program_for_one_runs_on_the_first_worker_whose_error_waits_for_none(launched, capsys) -> None:
    met = launched(0)
    assert run_main(lambda argv: 3, []) == 3
    assert run_main(raising(UserError("No such folder.")), []) == 2
    assert run_main(raising(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err == "error: No such folder.\ninterrupted\n"
    with pytest.raises(BrokenPipeError):
        first_alone(lambda: raising(BrokenPipeError())([]))
    with pytest.raises(ZeroDivisionError) as bug:
        run_main(raising(ZeroDivisionError()), [])
    assert bug.value.__suppress_context__
    assert not met


def test_a_program_for_one_does_nothing_on_another_worker(launched) -> None:
    met = launched(1)
    assert run_main(raising(UserError("No such folder.")), []) == 0
    assert not met


@pytest.mark.parametrize("rank", [0, 1])
def test_a_program_for_many_meets_over_an_error_but_not_over_the_first_ones_own(launched, rank: int) -> None:
    met = launched(rank)
    mistake = UserError("No such folder.")
    with pytest.raises(SystemExit):
        run_main(raising(mistake), [], many_workers=True)
    assert met == [mistake]
    met.clear()
    alone = run_main(lambda argv: first_alone(lambda: raising(mistake)(argv)), [], many_workers=True)
    assert alone == (2 if rank == 0 else 0)
    assert not met
