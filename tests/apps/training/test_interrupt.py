"""Ctrl-C: the first is a request, the second is meant. What launchers send is a request too."""

import os
import signal
import sys
import threading

import pytest

from apps.training import interrupt
from apps.training.interrupt import StopRequest


def test_the_first_ctrl_c_is_a_request_and_the_second_raises(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "ONE_PRESS", -1.0)
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert "Once more to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_ctrl_c_that_terminal_and_launcher_both_hand_on_is_one() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_launchers_signal_is_a_request_however_often_it_comes(
    number: signal.Signals, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interrupt, "ONE_PRESS", -1.0)
    before = signal.signal(number, signal.default_int_handler)  # SIGHUP is ignored where nohup started the tests
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stop.requested
        assert capsys.readouterr().err == f"\n{number.name}: finishing this step, then saving.\n"
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_it_leaves_signals_alone() -> None:
    seen: list[object] = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reader_that_has_gone_is_a_request_and_the_ctrl_c_that_ended_it_is_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The terminal's Ctrl-C ends `| tee` and may reach us after the print that finds nobody there."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        monkeypatch.setattr("sys.stderr", pipe)
        with StopRequest() as stop:
            print("step", flush=True)
            assert stop.requested
            os.kill(os.getpid(), signal.SIGINT)
        assert sys.stdout is pipe


def test_a_signal_in_the_middle_of_a_print_is_still_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class Printing:
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

        def flush(self) -> None: ...

    with StopRequest() as stop:
        monkeypatch.setattr("sys.stderr", Printing())
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.undo()
        assert stop.requested
