"""Sums by copies between the GPUs of a host; without two GPUs only that the others are told so."""

import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from apps.training.config import parse
from apps.training.programs import _reducer
from apps.training.workers.peer_copies import MOST_WORKERS, peers_in_reach
from backends.errors import UserError
from tests.apps.training.workers.test_reducer import alone  # noqa: F401


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_sum_by_copies_what_float64_says() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.apps.training.workers.peer_sums"]
    workers = [
        subprocess.Popen([*command, str(rank), port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=120)[0] for worker in workers]
    assert all(each.splitlines()[-1] == "right" for each in said), said


@pytest.mark.parametrize("workers", [(1, 1), (4, 2), (MOST_WORKERS + 1, MOST_WORKERS + 1)])
def test_one_worker_several_hosts_and_very_many_workers_do_not_copy(workers: tuple[int, int]) -> None:
    assert not peers_in_reach(*workers)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("asked", ["auto", "collectives", "copies"])
def test_where_copies_are_impossible_only_asking_for_them_is_an_error(asked: str) -> None:
    workers = SimpleNamespace(rank=0, world_size=2, local_world_size=2, sum_counts=lambda able: (able,))
    workers.device_group = torch.distributed.group.WORLD
    config = parse(["command=run", "checkpoint.config_name=demo", f"training.reduce_by={asked}"])
    if asked == "copies":
        with pytest.raises(UserError, match="needs GPUs of one host .* 0 of 2 workers have that"):
            _reducer(config, workers)
        return
    reducer = _reducer(config, workers)
    assert reducer is not None
    assert reducer.copies is None
