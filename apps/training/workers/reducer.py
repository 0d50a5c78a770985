"""Sums gradients over the workers while the backward goes on, a bucket at a time; with ZeRO-1 each group has an owner.

Sums, never means: the loss is already scaled by one over the counted positions of the whole job.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compiled.reduction import Gradients


@dataclass
class _Bucket:
    """Groups whose gradients travel together; `owner` is who gets the sum, None: everybody."""

    owner: int | None
    groups: list[tuple[int, Gradients]] = field(default_factory=list)
    nbytes: int = 0
    flat: Tensor | None = None
    work: Any = None


@dataclass
class _Parcel:
    """Parameters on their way from the worker that updated them; `targets` is empty at that worker."""

    work: Any
    flat: Tensor
    targets: list[Tensor]


class GradientReducer:
    """A `compiled.reduction.Reducer` over a torch process group.

    dtype: what gradients are summed in; None: their own, at least float32. bucket_bytes: how many are gathered before
    a sum is started. shards: ZeRO-1, each group is summed for, kept and updated by one worker, which then sends the
    parameters to all. before_waiting: called before this worker may have to wait for the others.
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
    ) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.dtype, self.bucket_bytes, self.shards = dtype, bucket_bytes, shards
        self.before_waiting = before_waiting
        self.owners: list[int] = []
        self._filling: _Bucket | None = None
        self._travelling: deque[_Bucket] = deque()
        self._published: list[_Parcel] = []

    def assign(self, group_bytes: Sequence[int]) -> None:
        """Give each group to the worker that has least so far, the largest first: all workers find the same."""
        self.owners = assign_owners(group_bytes, self.world_size)

    def owns(self, group: int) -> bool:
        return not self.shards or self.owners[group] == self.rank

    def start(self, group: int, gradients: Gradients) -> None:
        owner = self.owners[group] if self.shards else None
        if self._filling is not None and self._filling.owner != owner:
            self._send()
        bucket = self._filling = self._filling or _Bucket(owner)
        bucket.groups.append((group, gradients))
        bucket.nbytes += sum(gradient.numel() * self._dtype_of(gradient).itemsize for gradient in gradients.values())
        if bucket.nbytes >= self.bucket_bytes:
            self._send()

    def finished(self, *, everything: bool) -> Iterator[tuple[int, Gradients]]:
        """Without `everything`: the buckets before the last one sent. That one travels while the next are computed."""
        if everything and self._filling is not None:
            self._send()
        while len(self._travelling) > (0 if everything else 1):
            yield from self._receive(self._travelling.popleft())

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
            _unpack(parcel.flat, parcel.targets)
        self._published.clear()

    def _dtype_of(self, gradient: Tensor) -> torch.dtype:
        return torch.promote_types(gradient.dtype, torch.float32) if self.dtype is None else self.dtype

    def _send(self) -> None:
        """Start the sum of the bucket that was being filled."""
        bucket, self._filling = self._filling, None
        assert bucket is not None
        tensors = [gradient for _, gradients in bucket.groups for gradient in gradients.values()]
        if tensors:
            dtype = max((self._dtype_of(gradient) for gradient in tensors), key=lambda dtype: dtype.itemsize)
            bucket.flat = torch.empty(sum(map(torch.numel, tensors)), dtype=dtype, device=tensors[0].device)
            torch._foreach_copy_(_views(bucket.flat, tensors), tensors)
            if bucket.owner is None:
                bucket.work = dist.all_reduce(bucket.flat, group=self.group, async_op=True)
            else:
                bucket.work = dist.reduce(bucket.flat, group=self.group, group_dst=bucket.owner, async_op=True)
        self._travelling.append(bucket)

    def _receive(self, bucket: _Bucket) -> Iterator[tuple[int, Gradients]]:
        """The groups of a bucket, once it has been summed, as views into it."""
        if bucket.work is not None:
            self.before_waiting()
            bucket.work.wait()
        is_mine = bucket.owner is None or bucket.owner == self.rank
        tensors = [gradient for _, gradients in bucket.groups for gradient in gradients.values()]
        summed = iter(_views(bucket.flat, tensors) if bucket.flat is not None else [])
        for group, gradients in bucket.groups:
            wide = {name: _widened(next(summed)) for name in gradients}
            yield group, wide if is_mine else {}


def assign_owners(group_bytes: Sequence[int], world_size: int) -> list[int]:
    """The owner of each group: the largest group first, to the worker that has least so far (the lowest of equals)."""
    loads = [0] * world_size
    owners = [0] * len(group_bytes)
    for group in sorted(range(len(group_bytes)), key=lambda group: (-group_bytes[group], group)):
        owner = min(range(world_size), key=lambda rank: (loads[rank], rank))
        owners[group] = owner
        loads[owner] += group_bytes[group]
    return owners


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of `flat`, one behind the other, in the shapes of `like`."""
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]


def _unpack(flat: Tensor, targets: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), _views(flat, targets))


def _widened(gradient: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32))
