"""Processes, started for real: their output, their last error, and Ctrl-C."""

import sys
import time
from pathlib import Path

import pytest

from apps.sweeping.running import LastError, launcher_words, run_process
from backends.errors import UserError

POLITE = """
import signal, sys, time
def finish(*_):
    print("saved", flush=True); sys.exit(130)
signal.signal(signal.SIGINT, finish)
print("started", flush=True)
time.sleep(60)
"""


def test_output_goes_to_the_log_and_to_who_listens(tmp_path: Path) -> None:
    log, lines = tmp_path / "logs" / "run.log", []
    words = [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"]
    assert run_process(words, log, on_line=lines.append, stop=lambda: False) == 3
    assert sorted(lines) == ["err\n", "out\n"]
    assert log.read_text().startswith(f"$ {sys.executable} -c")
    assert "out\n" in log.read_text()


def test_a_request_to_stop_is_handed_on_once(tmp_path: Path) -> None:
    lines: list[str] = []
    started = time.monotonic()
    words = [sys.executable, "-c", POLITE]
    code = run_process(words, tmp_path / "log", on_line=lines.append, stop=lambda: bool(lines))
    assert (code, lines) == (130, ["started\n", "saved\n"])
    assert time.monotonic() - started < 30


def test_being_interrupted_again_ends_it(tmp_path: Path) -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_process([sys.executable, "-c", POLITE], tmp_path / "log", on_line=interrupt, stop=lambda: False)


def test_a_launcher_that_is_not_there_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot start no-such-launcher"):
        run_process(["no-such-launcher"], tmp_path / "log", on_line=print, stop=lambda: False)
    with pytest.raises(UserError, match="No closing quotation"):
        launcher_words("mpirun '-np")


@pytest.mark.parametrize(
    ("lines", "code", "said"),
    [
        (["Model: x", "error: No room.", "[proxy] a launcher's words"], 2, "No room."),
        (["Traceback:", "ValueError: odd", "bye"], 1, "exit code 1; ValueError: odd"),
        (["Epoch [1/1]"], -9, "ended by SIGKILL; last line: Epoch [1/1]"),
        ([], 1, "exit code 1; it printed nothing"),
    ],
)
def test_why_it_failed(lines: list[str], code: int, said: str) -> None:
    error = LastError()
    for line in lines:
        error.see(line)
    assert error.line(code) == said
