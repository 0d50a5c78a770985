"""Buckets and owners, in one process; several processes are in tests/compiled/test_many_workers.py."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from apps.training.workers.reducer import GradientReducer, assign_owners


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A gloo group of one: a sum is the tensor itself."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def gradients(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).view(2, 3).to(dtype), "bias": torch.tensor([7.0]).to(dtype)}


def reducer(group: dist.ProcessGroup, num_groups: int = 3, **options: object) -> GradientReducer:
    made = GradientReducer(group, rank=0, world_size=1, **options)
    made.assign([28] * num_groups)
    return made


def test_the_bucket_sent_last_travels_while_the_next_is_computed(alone: dist.ProcessGroup) -> None:
    each = reducer(alone, bucket_bytes=28)
    each.start(2, gradients())
    assert list(each.finished(everything=False)) == []
    each.start(1, gradients())
    assert [group for group, _ in each.finished(everything=False)] == [2]
    each.start(0, gradients())
    assert [group for group, _ in each.finished(everything=False)] == [1]
    assert [group for group, _ in each.finished(everything=True)] == [0]
    assert list(each.finished(everything=True)) == []


def test_small_groups_travel_together_and_come_out_as_they_went_in(alone: dist.ProcessGroup) -> None:
    whole = reducer(alone, num_groups=32, bucket_bytes=2**20)
    for group in (2, 1, 0):
        whole.start(group, gradients())
        assert list(whole.finished(everything=False)) == []
    found = dict(whole.finished(everything=True))
    assert list(found) == [2, 1, 0]
    for summed in found.values():
        assert all(torch.equal(summed[name], gradient) for name, gradient in gradients().items())
        assert all(tensor.is_contiguous() for tensor in summed.values())


def test_a_bucket_is_sent_with_an_eighth_of_all_at_the_latest(alone: dist.ProcessGroup) -> None:
    each = reducer(alone, num_groups=16, bucket_bytes=2**20)
    for group in (15, 14, 13):
        each.start(group, gradients())
        assert list(each.finished(everything=False)) == []
    each.start(12, gradients())
    assert [group for group, _ in each.finished(everything=False)] == [15, 14]  # one bucket


def test_a_large_group_travels_under_as_many_bytes_of_small_ones(alone: dist.ProcessGroup) -> None:
    each = reducer(alone, num_groups=5)
    each.start(3, {"projection": torch.ones(3, 7)})  # the bytes of three others
    for group in (2, 1):
        each.start(group, gradients())
        assert list(each.finished(everything=False)) == []
    each.start(0, gradients())
    assert [group for group, _ in each.finished(everything=False)] == [3]
    assert [group for group, _ in each.finished(everything=True)] == [2, 1, 0]


def test_nothing_waits_for_the_last_group(alone: dist.ProcessGroup) -> None:
    each = reducer(alone, num_groups=16)
    for _ in range(2):  # two steps
        for group in range(14):
            each.start(group, gradients())
        list(each.finished(everything=False))
        each.start(14, {"weight": torch.ones(1)})  # far from a bucket, but what follows is the last
        assert each._filling is None
        each.start(15, gradients())
        assert [group for group, _ in each.finished(everything=True)][-2:] == [14, 15]


@pytest.mark.parametrize(
    ("given_dtype", "asked", "expected"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.float32),  # summed in bfloat16, handed on as the update wants it
    ],
)
def test_sums_come_out_in_at_least_float32(
    alone: dist.ProcessGroup, given_dtype: torch.dtype, asked: torch.dtype | None, expected: torch.dtype
) -> None:
    each = reducer(alone, dtype=asked)
    each.start(0, gradients(given_dtype))
    ((_, summed),) = each.finished(everything=True)
    assert {tensor.dtype for tensor in summed.values()} == {expected}
    assert torch.equal(summed["bias"], torch.tensor([7.0], dtype=expected))


def test_waiting_for_others_is_told_before_it_begins(alone: dist.ProcessGroup) -> None:
    told: list[str] = []
    each = reducer(alone, bucket_bytes=1, before_waiting=lambda: told.append("waiting"))
    each.start(0, gradients())
    assert not told
    list(each.finished(everything=True))
    each.sum_(torch.ones(1))
    assert len(told) == 2


def test_a_group_without_gradients_travels_too(alone: dist.ProcessGroup) -> None:
    each = reducer(alone)
    each.start(0, {})
    assert list(each.finished(everything=True)) == [(0, {})]


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_owners_share_the_bytes_as_evenly_as_whole_groups_allow(sizes: list[int], world_size: int) -> None:
    owners = assign_owners(sizes, world_size)
    assert len(owners) == len(sizes)
    assert all(0 <= owner < world_size for owner in owners)
    loads = [
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(world_size)
    ]
    assert max(loads) - min(loads) <= max(sizes, default=0)
