"""Workers as the run sees them, in real processes under each launcher."""

import os
import signal
import threading
import time

import pytest
import torch

from apps.training.workers import group
from apps.training.workers.group import Workers, open_workers
from apps.training.workers.launch import Launch
from tests import warm_python
from tests.apps.training.workers.launchers import finish, run, start

LAUNCHERS = ["mpich", "torchrun", "openmpi"]


def test_one_worker_needs_no_group() -> None:
    workers = Workers.solo()
    assert (workers.rank, workers.world_size, workers.is_first, workers.device_group) == (0, 1, True, None)
    assert workers.sum_counts(3, 2**62) == (3, 2**62)
    tensor = torch.ones(2)
    assert workers.sum_(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    assert workers.broadcast_text("x") == "x"
    workers.barrier()
    workers.doing("nothing")
    workers.waiting("for nobody")


def test_one_worker_keeps_its_exceptions() -> None:
    with pytest.raises(KeyError), open_workers(Launch(), device_type="cpu", timeout=1.0):
        raise KeyError("mine")


def test_the_watch_hears_again_and_again_of_work_that_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "BEAT", 0.01)
    heard: list[str] = []
    often = threading.Event()
    workers = Workers.solo()

    def hear(what: str) -> None:
        heard.append(what)
        if len(heard) == 3:
            often.set()

    monkeypatch.setattr(workers, "doing", hear)
    with workers.busy("saving the model"):
        assert often.wait(10)
    count = len(heard)
    time.sleep(0.05)
    assert heard == ["saving the model"] * count


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_workers_sum_and_only_the_first_prints(launcher: str) -> None:
    ended = run(launcher, "well", "0", python=warm_python.python())
    assert ended.code == 0, ended.err
    # 2 workers add 2^59 each: exact far beyond what a double holds. 12 steps of 1 + 2.
    expected = ["rank 0 prints", "text: of rank 0", f"count {2**60}, total 36, steps 12, saved"]
    assert [line for line in ended.out.splitlines() if line] == expected
    assert "rank 0 warns" in ended.err
    assert "rank 1 warns" not in ended.err


def test_there_may_be_more_workers_than_cores() -> None:
    workers = (os.cpu_count() or 1) + 1
    ended = run("mpich", "well", "0", "3", workers=workers, python=warm_python.python())
    assert ended.code == 0, ended.err
    assert f"total {3 * sum(range(1, workers + 1))}, steps 3" in ended.out


@pytest.mark.parametrize(("launcher", "number"), [("mpich", signal.SIGINT), ("torchrun", signal.SIGTERM)])
def test_a_stop_request_ends_all_workers_after_the_same_step_and_they_save(launcher: str, number: int) -> None:
    process = start(launcher, "well", "0", "4000")
    assert process.stdout is not None
    while "text:" not in process.stdout.readline():
        pass
    process.send_signal(number)
    ended = finish(process)
    assert ended.code != 0
    assert launcher == "torchrun" or ended.code == 130  # torchrun has a code of its own
    assert "saved" in ended.out
    assert ended.err.count("finishing this step, then saving") == 1
    assert ended.errors == []
