"""Devices and threads."""

import pytest
import torch

from apps.training.config import parse
from apps.training.devices import describe, open_device, peak_of
from apps.training.workers.group import Workers
from apps.training.workers.launch import Launch


def test_the_cpu_with_the_threads_that_were_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        device = open_device("cpu", parse(["command=run", "run.num_threads=2"]), Workers.solo())
        assert device == torch.device("cpu")
        assert describe(device) == "CPU, 2 threads"
        open_device("cpu", parse(["command=run"]), Workers.solo())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_workers_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    before = torch.get_num_threads()
    try:
        open_device(
            "cpu", parse(["command=run"]), Workers(Launch(rank=5, world_size=8, local_rank=1, local_world_size=4))
        )
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_cpus_peak_is_not_known() -> None:
    assert peak_of(torch.device("cpu"), "float32") is None
