"""Sums by copies between the GPUs of a host; without two GPUs only that the others are told so."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from apps.training.config import parse
from apps.training.programs import _reducer
from apps.training.workers.peer_copies import MOST_WORKERS, PeerCopies, peers_in_reach
from apps.training.workers.reducer import GradientReducer
from backends.errors import UserError
from compiled.reduction import addend
from tests.apps.training.workers import fake_gpus
from tests.apps.training.workers.peer_sums import SHAPES, gradients
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


def added(
    received: Iterator[tuple[int, dict[str, torch.Tensor]]], pairs: list[int]
) -> dict[int, dict[str, torch.Tensor]]:
    """What an update makes of it: of pairs the sum; their groups are added to `pairs`."""
    sums = {}
    for group, parts in received:
        names = [name for name in parts if addend(name) in parts]
        assert len(names) * 2 == len(parts) or not names
        sums[group] = {name: parts[name] + parts[addend(name)] for name in names} if names else parts
        pairs += [group] if names else []
    return sums


@pytest.mark.parametrize("asked", ["sums", "sums at the end", "pairs"])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_whoever_is_early_or_late_every_worker_gets_the_same_sums(
    monkeypatch: pytest.MonkeyPatch, world_size: int, shards: bool, asked: str
) -> None:
    """On threads in place of GPUs; at the end of a step slots were used again, and sums were made for that."""
    fake_gpus.install(monkeypatch, fake_gpus.Host(world_size))
    sums: dict[tuple[int, int], dict[int, dict[str, torch.Tensor]]] = {}
    paired: dict[tuple[int, int], list[int]] = {}

    def work(rank: int) -> None:
        copies = PeerCopies(None, rank=rank, world_size=world_size)
        reducer = GradientReducer(None, rank=rank, world_size=world_size, shards=shards, copies=copies)
        reducer.assign([sum(torch.Size(shape).numel() for shape in each.values()) for each in SHAPES * 3])
        reducer.bucket_bytes = 9_000  # of both kinds: one group to a bucket, and several
        for step in range(4):
            time.sleep(0.002 * ((rank + step) % world_size))
            found: dict[int, dict[str, torch.Tensor]] = {}
            mine = gradients(step, rank, torch.float32) * 3
            pairs, seen = asked == "pairs", paired.setdefault((step, rank), [])
            for group in reversed(range(len(mine))):
                reducer.start(group, dict(mine[group]))
                if asked != "sums at the end":
                    found |= added(reducer.finished(everything=False, pairs=pairs), seen)
            sums[step, rank] = found | added(reducer.finished(everything=True, pairs=pairs), seen)
            for group, some in sums[step, rank].items():
                names = SHAPES[group % len(SHAPES)] if reducer.owns(group) else {}
                assert some.keys() == names.keys()

    fake_gpus.run_workers(world_size, work)
    # but for groups that had to be added up early, since their place was needed
    assert all(bool(groups) == (asked == "pairs" and world_size == 2) for groups in paired.values())
    for step in range(4):
        parts = [gradients(step, rank, torch.float32) * 3 for rank in range(world_size)]
        for group, names in enumerate(SHAPES * 3):
            having = [sums[step, rank][group] for rank in range(world_size) if sums[step, rank][group]]
            assert len(having) == (0 if not names else 1 if shards else world_size)
            for name in names:
                exact = sum(part[group][name].double() for part in parts)
                for found in having:
                    torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-6)
                    assert torch.equal(found[name], having[0][name])
