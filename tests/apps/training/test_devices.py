"""Devices and threads."""

from collections.abc import Iterator

import pytest
import torch

from apps.training.config import parse
from apps.training.devices import describe, open_device, peak_of
from apps.training.workers.group import Workers
from apps.training.workers.launch import Launch


@pytest.fixture
def switches() -> Iterator[None]:
    """What a run sets for its whole process."""
    threads, ordered = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(ordered)
    torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


@pytest.mark.usefixtures("switches")
def test_the_cpu_with_the_threads_that_were_asked_for() -> None:
    device = open_device("cpu", parse(["command=run", "run.num_threads=2"]), Workers.solo())
    assert device == torch.device("cpu")
    assert describe(device) == "CPU, 2 threads"
    open_device("cpu", parse(["command=run"]), Workers.solo())
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("switches")
def test_two_threads_sum_the_embeddings_gradient_to_the_same_bits_every_time() -> None:
    open_device("cpu", parse(["command=run", "run.num_threads=2"]), Workers.solo())
    make = torch.Generator().manual_seed(0)
    rows = torch.randint(64, (4096,), generator=make)  # each many times
    gradient = torch.randn(4096, 256, generator=make)
    sums = [torch.zeros(64, 256).index_put_((rows,), gradient, accumulate=True) for _ in range(20)]
    assert all(torch.equal(each, sums[0]) for each in sums)
    exact = torch.zeros(64, 256, dtype=torch.float64).index_add_(0, rows, gradient.double())
    torch.testing.assert_close(sums[0].double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("switches")
def test_the_workers_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    open_device("cpu", parse(["command=run"]), Workers(Launch(rank=5, world_size=8, local_rank=1, local_world_size=4)))
    assert torch.get_num_threads() == 3


def test_a_cpus_peak_is_not_known() -> None:
    assert peak_of(torch.device("cpu"), "float32") is None
