"""Sums over the GPUs of one host by their copy engines: no multiprocessor is taken from the matrix products.

A collective's kernel holds some multiprocessors for as long as it runs; a matrix product whose blocks fill all of them
then needs a second wave for the few that found no place. Here each worker copies the others' gradients over the direct
link, which the copy engines do alone, and adds them up itself, in the workers' order: the same bits everywhere, and for
bfloat16 gradients half the traffic of a float32 sum at the same exactness. Signals in the devices' memory say when a
neighbour's gradients are there and when they were taken, so all of it can be recorded in a CUDA graph.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apps.training.workers.bucket import at_least_float32

MOST_WORKERS = 8  # each fetches from all others: the traffic of a worker grows with their number
SLOTS = 4  # exchanges on their way at once: one offered, one being fetched, two whose sums are not asked for yet
ALIGNED = 16  # bytes
IS_THERE, WAS_TAKEN = 0, 1  # channels of a slot's signals


def peers_in_reach(world_size: int, local_world_size: int) -> bool:
    """Whether this process sees the GPUs of all workers (its own first, see `own_gpu`) and may copy from each."""
    if not 1 < world_size == local_world_size <= MOST_WORKERS or torch.cuda.device_count() < world_size:
        return False
    return all(torch.cuda.can_device_access_peer(0, peer) for peer in range(1, world_size))


class PeerCopies:
    """Memory that the GPUs of one host read from each other, for sums of flat tensors.

    Every worker opens and starts the same exchanges in the same order. `group`: all workers, over NCCL. What one worker
    offers when it starts an exchange, the others fetch when they start the next one, and look whether it was taken at
    the one after: by then the signals are there, and no waiting kernel takes a place from a matrix product.
    """

    def __init__(self, group: dist.ProcessGroup, *, rank: int, world_size: int) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.peers = [(rank + ahead) % world_size for ahead in range(1, world_size)]  # not all from the same one
        self.stream = torch.cuda.Stream(priority=-1)
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._next = 0
        self._offered: Exchange | None = None
        self._fetched: Exchange | None = None

    def open(self, numel: int, dtype: torch.dtype, owner: int | None) -> Exchange:
        """The next exchange of `numel` values; `owner`: who gets the sum, None: everybody."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        slot.clear()
        padded = -(-numel * dtype.itemsize // ALIGNED) * ALIGNED // dtype.itemsize
        slot.reserve(padded * dtype.itemsize * self.world_size, self.group)
        slot.exchange = Exchange(self, slot, numel, padded, dtype, owner)
        return slot.exchange

    def start(self, exchange: Exchange) -> None:
        """Offer what was filled in, behind all that the device was given so far; and fetch the one before."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            exchange.offer()
        self.advance(exchange)

    def advance(self, offered: Exchange | None = None) -> None:
        """Fetch what was offered last, and see that what was fetched before it has been taken by all."""
        with torch.cuda.stream(self.stream):
            if self._fetched is not None:
                self._fetched.release()
            if self._offered is not None:
                self._offered.fetch()
        self._fetched, self._offered = self._offered, offered

    def finish(self) -> None:
        """End a step: nothing is on its way any more, and the next one uses the slots from the first on.

        So a recorded step does what the one before it did.
        """
        self.advance()
        self.advance()
        for slot in self._slots:
            slot.clear()
        self._next = 0


class Exchange:
    """One sum: fill `mine`, have it started, and `sum()` when it is needed. The others read `mine` from their side."""

    def __init__(
        self, copies: PeerCopies, slot: _Slot, numel: int, padded: int, dtype: torch.dtype, owner: int | None
    ) -> None:
        assert slot.memory is not None
        self.copies, self.slot, self.owner = copies, slot, owner
        self.numel, self.padded, self.dtype = numel, padded, dtype
        self.is_mine = owner in (None, copies.rank)
        self.takers = copies.peers if owner is None else [owner] if owner != copies.rank else []
        nbytes = padded * dtype.itemsize * copies.world_size
        self.rows = slot.memory[:nbytes].view(dtype).view(copies.world_size, padded)
        self.mine = self.rows[copies.rank, :numel]
        self._fetched: torch.cuda.Event | None = None
        self._released: torch.cuda.Event | None = None
        self._sum: Tensor | None = None

    def offer(self) -> None:
        for peer in self.takers:
            self.slot.handle.put_signal(peer, IS_THERE)

    def fetch(self) -> None:
        handle = self.slot.handle
        for peer in self.copies.peers if self.is_mine else []:
            theirs = handle.get_buffer(peer, [self.numel], self.dtype, peer * self.padded)
            handle.wait_signal(peer, IS_THERE)
            self.rows[peer, : self.numel].copy_(theirs, non_blocking=True)
            handle.put_signal(peer, WAS_TAKEN)
        self._fetched = _recorded()

    def release(self) -> None:
        for peer in self.takers:
            self.slot.handle.wait_signal(peer, WAS_TAKEN)
        self._released = _recorded()

    def sum(self) -> Tensor | None:
        """The sum [numel] in at least float32, in the workers' order; None where another worker owns it."""
        if self.is_mine and self._sum is None:
            if self._fetched is None:
                self.copies.advance()
            assert self._fetched is not None
            self._fetched.wait()
            self._sum = self.rows.sum(0, dtype=at_least_float32(self.rows))[: self.numel]
        return self._sum

    def close(self) -> None:
        """Nobody needs the memory any more: it is added up here, and was taken by the others."""
        while self._released is None:
            self.copies.advance()
        self.sum()
        self._released.wait()


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


@dataclass
class _Slot:
    """Memory of every worker for one exchange at a time: a row for each worker's values."""

    memory: Tensor | None = None
    handle: Any = None
    exchange: Exchange | None = None

    def clear(self) -> None:
        if self.exchange is not None:
            self.exchange.close()
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
