"""Sums gradients over the workers while the backward goes on, a bucket at a time; with ZeRO-1 each group has an owner.

Sums, never means: the loss is already scaled by one over the counted positions of the whole job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apps.training.workers.bucket import Bucket, CopiedBucket, TouchedRows, views
from apps.training.workers.peer_copies import PeerCopies
from compiled.reduction import Gradients

SHARE = 8  # a bucket is sent with an eighth of all bytes at the latest, so that a small model has something to overlap


@dataclass
class _Parcel:
    """Parameters on their way from the worker that updated them; `targets` is empty at that worker."""

    work: Any
    flat: Tensor
    targets: list[Tensor]


class GradientReducer:
    """A `compiled.reduction.Reducer` over a torch process group.

    dtype: what gradients are summed in; None: their own, at least float32. bucket_bytes: how many are gathered before
    a sum is started, or an eighth of all if that is less. shards: ZeRO-1, each group is summed for, kept and updated by
    one worker, which then sends the parameters to all. before_waiting: called before this worker may have to wait for
    the others. copies: how gradients are summed where the GPUs read each other's memory; None: by collectives.
    """

    is_alone = False
    widens = True

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = 50 * 2**20,
        shards: bool = False,
        before_waiting: Callable[[], None] = lambda: None,
        copies: PeerCopies | None = None,
    ) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.dtype, self.bucket_bytes, self.shards = dtype, bucket_bytes, shards
        self.before_waiting, self.copies = before_waiting, copies
        self.owners: list[int] = []
        self._touched: dict[int, TouchedRows] = {}
        self._started = 0
        self._filling: Bucket | None = None
        self._travelling: deque[Bucket] = deque()
        self._published: list[_Parcel] = []

    def assign(self, group_bytes: Sequence[int]) -> None:
        """Give each group to the worker that has least so far, the largest first: all workers find the same."""
        self.owners = assign_owners(group_bytes, self.world_size)
        self.bucket_bytes = min(self.bucket_bytes, sum(group_bytes) // SHARE)

    def owns(self, group: int) -> bool:
        return not self.shards or self.owners[group] == self.rank

    def expect_rows(self, group: int, rows: Sequence[Tensor], num_rows: int) -> None:
        if rows[0].device.type == "cpu":  # the host of a GPU would have to wait for their number
            self._touched[group] = TouchedRows(rows, num_rows, self.group)

    def start(self, group: int, gradients: Gradients) -> None:
        owner = self.owners[group] if self.shards else None
        if self._filling is not None and self._filling.owner != owner:
            self._send()
        self._filling = self._filling or self._bucket(owner)
        self._filling.add(group, gradients, self._rows_of(group))
        self._started += 1
        # Behind the last group nothing is computed any more: what was gathered so far goes before it.
        if self._filling.nbytes >= self.bucket_bytes or self._started == len(self.owners) - 1:
            self._send()

    def finished(self, *, everything: bool, pairs: bool = False) -> Iterator[tuple[int, Gradients]]:
        """Without `everything`: at most one bucket, the oldest if at least its own number of bytes was sent behind it.

        So one of equals travels while the next is computed, and a large one while several small ones are.
        """
        if everything:
            self._started = 0
            if self._filling is not None:
                self._send()
        due = len(self._travelling) if everything else int(self._is_due())
        for _ in range(due):
            bucket = self._travelling.popleft()
            self.before_waiting()
            is_mine = bucket.owner is None or bucket.owner == self.rank
            for group, summed in bucket.receive(pairs):
                yield group, summed if is_mine else {}
        if everything and self.copies is not None:
            self.copies.finish()

    def sum_(self, tensor: Tensor) -> Tensor:
        self.before_waiting()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        self.before_waiting()
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def publish(self, group: int, parameters: Mapping[str, Tensor]) -> None:
        if not self.shards:
            return
        tensors = [parameter.detach() for parameter in parameters.values()]
        is_mine = self.owners[group] == self.rank
        if is_mine:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        else:
            flat = torch.empty(sum(map(torch.numel, tensors)), dtype=tensors[0].dtype, device=tensors[0].device)
        work = dist.broadcast(flat, group=self.group, group_src=self.owners[group], async_op=True)
        self._published.append(_Parcel(work, flat, [] if is_mine else tensors))

    def settle(self) -> None:
        for parcel in self._published:
            self.before_waiting()
            parcel.work.wait()
            if parcel.targets:
                torch._foreach_copy_(parcel.targets, views(parcel.flat, parcel.targets))
        self._published.clear()

    def _bucket(self, owner: int | None) -> Bucket:
        return Bucket(owner, self.dtype) if self.copies is None else CopiedBucket(owner, self.dtype, copies=self.copies)

    def _rows_of(self, group: int) -> Tensor | None:
        """The rows of a group that have to travel; None: all of them."""
        touched = self._touched.pop(group, None)
        if touched is None:
            return None
        self.before_waiting()
        return touched.few()

    def _send(self) -> None:
        bucket, self._filling = self._filling, None
        assert bucket is not None
        bucket.send(self.group, self.bucket_bytes)
        self._travelling.append(bucket)

    def _is_due(self) -> bool:
        ahead = 1 if self.copies is None else 2  # copies of a bucket begin when the next one is sent
        behind = sum(bucket.nbytes for bucket in list(self._travelling)[ahead:])
        return len(self._travelling) > ahead and behind >= self._travelling[0].nbytes


def assign_owners(group_bytes: Sequence[int], world_size: int) -> list[int]:
    """The owner of each group: the largest group first, to the worker that has least so far (the lowest of equals)."""
    loads = [0] * world_size
    owners = [0] * len(group_bytes)
    for group in sorted(range(len(group_bytes)), key=lambda group: (-group_bytes[group], group)):
        owner = min(range(world_size), key=lambda rank: (loads[rank], rank))
        owners[group] = owner
        loads[owner] += group_bytes[group]
    return owners
