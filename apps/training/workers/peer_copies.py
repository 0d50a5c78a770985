"""Sums over the GPUs of one host by their copy engines: no multiprocessor is taken from the matrix products.

A collective's kernel holds some multiprocessors for as long as it runs; a matrix product whose blocks fill all of them
then needs a second wave for the few that found no place. Here each worker copies the others' gradients over the direct
link, which the copy engines do alone, and adds them up itself, in the workers' order: the same bits everywhere, and for
bfloat16 gradients half the traffic of a float32 sum at the same exactness. Signals in the devices' memory say when a
neighbour's gradients are there and when they were taken, so all of it can be recorded in a CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apps.training.workers.bucket import Bucket, at_least_float32, views
from compiled.reduction import Gradients

MOST_WORKERS = 8  # each fetches from all others: the traffic of a worker grows with their number
SLOTS = 3  # buckets on their way at once
ALIGNED = 16  # bytes
IS_THERE, WAS_TAKEN = 0, 1  # channels of a slot's signals


def peers_in_reach(world_size: int, local_world_size: int) -> bool:
    """Whether this process sees the GPUs of all workers (its own first, see `own_gpu`) and may copy from each."""
    if not 1 < world_size == local_world_size <= MOST_WORKERS or torch.cuda.device_count() < world_size:
        return False
    return all(torch.cuda.can_device_access_peer(0, peer) for peer in range(1, world_size))


class PeerCopies:
    """Memory that the GPUs of one host read from each other, for sums of flat tensors.

    Every worker opens and starts the same exchanges in the same order. `group`: all workers, over NCCL.
    """

    def __init__(self, group: dist.ProcessGroup, *, rank: int, world_size: int) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.peers = [(rank + ahead) % world_size for ahead in range(1, world_size)]  # not all from the same one
        self.stream = torch.cuda.Stream(priority=-1)
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._next = 0

    def open(self, numel: int, dtype: torch.dtype, owner: int | None) -> Exchange:
        """The next exchange of `numel` values; `owner`: who gets the sum, None: everybody."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        slot.clear()
        padded = -(-numel * dtype.itemsize // ALIGNED) * ALIGNED // dtype.itemsize
        slot.reserve(padded * dtype.itemsize * self.world_size, self.group)
        slot.exchange = Exchange(self, slot, numel, padded, dtype, owner)
        return slot.exchange

    def rewind(self) -> None:
        """Each step uses the slots from the first on, so that a recorded one does what the one before it did."""
        for slot in self._slots:
            slot.clear()
        self._next = 0


class Exchange:
    """One sum: fill `mine`, `start()`, and `sum()` when it is needed. `mine` lies in memory that the others read."""

    def __init__(
        self, copies: PeerCopies, slot: _Slot, numel: int, padded: int, dtype: torch.dtype, owner: int | None
    ) -> None:
        assert slot.memory is not None
        self.copies, self.slot, self.owner = copies, slot, owner
        self.numel, self.padded, self.dtype = numel, padded, dtype
        nbytes = padded * dtype.itemsize * copies.world_size
        self.rows = slot.memory[:nbytes].view(dtype).view(copies.world_size, padded)
        self.mine = self.rows[copies.rank, :numel]
        self._done: torch.cuda.Event | None = None
        self._sum: Tensor | None = None

    def start(self) -> None:
        """Fetch the others' values behind all that was queued so far, beside what comes next."""
        rank, peers, handle = self.copies.rank, self.copies.peers, self.slot.handle
        givers = peers if self.owner in (None, rank) else []
        takers = peers if self.owner is None else [self.owner] if self.owner != rank else []
        stream = self.copies.stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for peer in takers:
                handle.put_signal(peer, IS_THERE)
            for peer in givers:
                theirs = handle.get_buffer(peer, [self.numel], self.dtype, peer * self.padded)
                handle.wait_signal(peer, IS_THERE)
                self.rows[peer, : self.numel].copy_(theirs, non_blocking=True)
                handle.put_signal(peer, WAS_TAKEN)
            for peer in takers:
                handle.wait_signal(peer, WAS_TAKEN)
            self._done = torch.cuda.Event()
            self._done.record()

    def sum(self) -> Tensor | None:
        """The sum [numel] in at least float32, in the workers' order; None where another worker owns it."""
        if self._done is not None:
            self._done.wait()
            self._done = None
            if self.owner in (None, self.copies.rank):
                self._sum = self.rows.sum(0, dtype=at_least_float32(self.rows))[: self.numel]
        return self._sum


@dataclass
class _Slot:
    """Memory of every worker for one exchange at a time: a row for each worker's values."""

    memory: Tensor | None = None
    handle: Any = None
    exchange: Exchange | None = None

    def clear(self) -> None:
        """Make sure that nobody needs the slot's values any more: add up what was fetched and not asked for yet."""
        if self.exchange is not None:
            self.exchange.sum()
            self.exchange = None

    def reserve(self, nbytes: int, group: dist.ProcessGroup) -> None:
        """At least `nbytes`; all workers find out together that it takes more memory, in the first step of a kind."""
        if self.memory is not None and self.memory.numel() >= nbytes:
            return
        from torch.distributed import _symmetric_memory as symmetric_memory

        torch.cuda.synchronize()  # the smaller memory is given back: nobody is to read there any more
        # every worker's GPU is the first that it sees itself, which PyTorch takes for one GPU used twice
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        self.memory = symmetric_memory.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", 0))
        self.handle = symmetric_memory.rendezvous(self.memory, group)


@dataclass
class CopiedBucket(Bucket):
    """Gradients that are copied from worker to worker, and added up by each."""

    copies: PeerCopies | None = None
    exchange: Exchange | None = None
    shapes: list[tuple[int, dict[str, torch.Size]]] = field(default_factory=list)

    def send(self, group: dist.ProcessGroup, as_they_are: int) -> None:
        """Copy all gradients to where the others find them; the tensors themselves are no longer needed."""
        assert self.copies is not None
        tensors = [gradient for _, gradients in self.groups for gradient in gradients.values()]
        self.shapes = [(number, {name: each.shape for name, each in some.items()}) for number, some in self.groups]
        if tensors:
            dtype = max((self.dtype or tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
            self.exchange = self.copies.open(sum(map(torch.numel, tensors)), dtype, self.owner)
            torch._foreach_copy_(views(self.exchange.mine, tensors), tensors)
            self.exchange.start()
        for _, gradients in self.groups:
            gradients.clear()

    def receive(self) -> Iterator[tuple[int, Gradients]]:
        """Each group with its sums, in at least float32; without any where another worker owns them."""
        summed = None if self.exchange is None else self.exchange.sum()
        end = 0
        for group, shapes in self.shapes:
            gradients: Gradients = {}
            for name, shape in shapes.items():
                begin, end = end, end + shape.numel()
                if summed is not None:
                    gradients[name] = summed[begin:end].view(shape)
            yield group, gradients
