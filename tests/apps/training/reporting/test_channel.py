"""A logger that fails, hangs or is slow: training is never stopped, and it is said once."""

import threading
import time
from collections.abc import Mapping

import pytest

from apps.training.loggers import RunLogger
from apps.training.reporting import channel as channel_module
from apps.training.reporting.channel import Channel
from apps.training.reporting.pace import Report


class Memory(RunLogger):
    """Keeps what it is told, and the threads it is told by."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict[str, float]]] = []
        self.threads = {threading.current_thread()}
        self.failed: bool | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.threads.add(threading.current_thread())
        self.told.append((step, dict(values)))

    def close(self, *, failed: bool) -> None:
        self.threads.add(threading.current_thread())
        self.failed = failed


@pytest.mark.parametrize("failed", [False, True])
def test_every_report_arrives_in_order_in_one_thread(failed: bool) -> None:
    loggers: list[Memory] = []

    def start() -> Memory:
        loggers.append(Memory())
        return loggers[0]

    channel = Channel("memory", start)
    for step in range(100):
        channel.send(Report(step, {"loss": float(step)}))
    channel.close(failed=failed)
    assert loggers[0].told == [(step, {"loss": float(step)}) for step in range(100)]
    assert loggers[0].failed is failed
    assert len(loggers[0].threads) == 1
    assert threading.current_thread() not in loggers[0].threads
    assert channel.complaint() is None


class Bad(Memory):
    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == 2:
            raise ConnectionError("no route to host\nmore of it")
        super().log(step, values)


def test_a_failure_is_said_once() -> None:
    bad = Bad()
    channel = Channel("bad", lambda: bad)
    for step in range(1, 6):
        channel.send(Report(step, {}))
    channel.close(failed=False)
    assert channel.complaint() == (
        "warning: logging to bad failed, the run goes on without it: ConnectionError: no route to host"
    )
    assert channel.complaint() is None
    assert [step for step, _ in bad.told] == [1]


@pytest.mark.parametrize("error", [RuntimeError("no login"), SystemExit(3)])
def test_one_that_cannot_start_is_like_one_that_fails_later(error: BaseException) -> None:
    def start() -> RunLogger:
        raise error

    channel = Channel("never", start)
    channel.send(Report(1, {}))
    channel.close(failed=False)
    assert "logging to never failed" in (channel.complaint() or "")


def test_one_that_hangs_holds_up_neither_the_steps_nor_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MAX_WAITING", 5)
    release = threading.Event()

    class Slow(Memory):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            release.wait(30)

    began = time.monotonic()
    channel = Channel("slow", Slow)
    for step in range(20):
        channel.send(Report(step, {}))
    channel.close(failed=False, timeout=0.05)
    assert time.monotonic() - began < 5
    assert "lags 5 reports behind" in (channel.complaint() or "")
    other = Channel("slow", Slow)
    other.send(Report(1, {}))
    other.close(failed=False, timeout=0.05)
    assert "had not finished 0.05 s after the last step" in (other.complaint() or "")
    release.set()
