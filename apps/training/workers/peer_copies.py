"""Sums over the GPUs of one host by their copy engines: no multiprocessor is taken from the matrix products.

A collective's kernel holds some multiprocessors for as long as it runs; a matrix product whose blocks fill all of them
then needs a second wave for the few that found no place. Here each worker writes its gradients, as they are, into the
others' memory over the direct link, which the copy engines do alone. Each adds them up itself, in the workers' order:
the same bits everywhere, and for bfloat16 gradients half the traffic of a float32 sum at the same exactness. Of two
workers' it is the update that adds, which costs no pass over memory. Signals in the devices' memory say when a
neighbour's gradients are there and when they were taken, so all of it can be recorded in a CUDA graph.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apps.training.workers.bucket import at_least_float32

MOST_WORKERS = 8  # each sends to all others: the traffic of a worker grows with their number
SLOTS = 4  # exchanges on their way at once: one leaves, two are there or soon will be, one is being taken
ALIGNED = 16  # bytes
IS_THERE, WAS_TAKEN = 0, 1  # channels of a slot's signals


def peers_in_reach(world_size: int, local_world_size: int) -> bool:
    """Whether this process sees the GPUs of all workers (its own first, see `own_gpu`) and may copy from each."""
    if not 1 < world_size == local_world_size <= MOST_WORKERS or torch.cuda.device_count() < world_size:
        return False
    return all(torch.cuda.can_device_access_peer(0, peer) for peer in range(1, world_size))


class PeerCopies:
    """Memory that the GPUs of one host write into for each other, for sums of tensors.

    Every worker opens and starts the same exchanges in the same order. `group`: all workers, over NCCL. Started
    exchanges leave at once; whether the others' have come is looked at when the next one is started: by then they
    have, and no waiting kernel takes a place from a matrix product.
    """

    def __init__(self, group: dist.ProcessGroup, *, rank: int, world_size: int) -> None:
        self.group, self.rank, self.world_size = group, rank, world_size
        self.peers = [(rank + ahead) % world_size for ahead in range(1, world_size)]  # not all to the same one
        self.stream = torch.cuda.Stream(priority=-1)
        self._slots = [_Slot() for _ in range(SLOTS)]
        self._next = 0
        self._last: Exchange | None = None

    def open(self, tensors: Sequence[Tensor], owner: int | None) -> Exchange:
        """The next exchange, of contiguous `tensors` of one dtype; `owner`: who gets their sums, None: everybody."""
        slot = self._slots[self._next]
        self._next = (self._next + 1) % SLOTS
        # not before: a kernel that waits for what is not due yet takes a multiprocessor from the products meanwhile
        self.stream.wait_stream(torch.cuda.current_stream())
        slot.clear()
        step = ALIGNED // tensors[0].element_size()
        padded = sum(-(-tensor.numel() // step) * step for tensor in tensors)
        slot.reserve(padded * tensors[0].element_size() * self.world_size, self.group)
        slot.exchange = Exchange(self, slot, list(tensors), padded, owner)
        return slot.exchange

    def start(self, exchange: Exchange) -> None:
        """Send an exchange, behind all that the device was given so far; and see that the one before has come."""
        self.stream.wait_stream(torch.cuda.current_stream())
        exchange.send()
        if self._last is not None:
            self._last.arrive()
        self._last = exchange

    def finish(self) -> None:
        """End a step: nothing is on its way any more, and the next one uses the slots from the first on.

        So a recorded step does what the one before it did.
        """
        for slot in self._slots:
            slot.clear()
        torch.cuda.current_stream().wait_stream(self.stream)
        self._next, self._last = 0, None


class Exchange:
    """One sum of each of some tensors: start it, later ask for `sums` or the `pair`, then `take` it.

    Each worker has a row for each worker's tensors, which lie in it one behind the other; the others write theirs.
    """

    def __init__(self, copies: PeerCopies, slot: _Slot, tensors: list[Tensor], padded: int, owner: int | None) -> None:
        assert slot.memory is not None
        self.copies, self.slot, self.tensors, self.padded = copies, slot, tensors, padded
        self.dtype = tensors[0].dtype
        self.shapes = [tensor.shape for tensor in tensors]
        self.is_mine = owner in (None, copies.rank)
        self.senders = copies.peers if self.is_mine else []
        self.takers = copies.peers if owner is None else [owner] if owner != copies.rank else []
        nbytes = padded * self.dtype.itemsize * copies.world_size
        self.rows = slot.memory[:nbytes].view(self.dtype).view(copies.world_size, padded)
        self._sent: torch.cuda.Event | None = None
        self._arrived: torch.cuda.Event | None = None
        self._sums: list[Tensor] | None = None
        self._is_taken = False

    def send(self) -> None:
        with torch.cuda.stream(self.copies.stream):
            for peer in self.takers:
                handle, begin = self.slot.handle, self.copies.rank * self.padded
                theirs = handle.get_buffer(peer, [self.padded], self.dtype, begin)
                for place, tensor in zip(self._pieces(theirs), self.tensors, strict=True):
                    place.copy_(tensor, non_blocking=True)
                handle.put_signal(peer, IS_THERE)
            self._sent = _recorded()

    def arrive(self) -> None:
        """See, behind what was sent so far, that all others' tensors are here."""
        if self._arrived is None:
            with torch.cuda.stream(self.copies.stream):
                for peer in self.senders:
                    self.slot.handle.wait_signal(peer, IS_THERE)
                self._arrived = _recorded()

    def sums(self) -> list[Tensor]:
        """The sums, in at least float32 and in the workers' order; none where another worker owns them."""
        if self._sums is None:
            self._sums = self._added_up() if self.is_mine else []
        return self._sums

    def _added_up(self) -> list[Tensor]:
        self._wait()
        mine = self._pieces(self.rows[self.copies.rank])
        torch._foreach_copy_(mine, self.tensors)
        return self._pieces(self.rows.sum(0, dtype=at_least_float32(self.rows)))

    def pair(self) -> list[list[Tensor]] | None:
        """This worker's tensors and the other's, until `take`; None where there are more, or the sums were made."""
        if not self.is_mine or len(self.copies.peers) != 1 or self._sums is not None:
            return None
        self._wait()
        return [self.tensors, self._pieces(self.rows[self.copies.peers[0]])]

    def take(self) -> None:
        """Nobody here reads the tensors any more: the others may write the next ones."""
        if self._is_taken:
            return
        assert self._sent is not None
        self._sent.wait()  # then their memory may be used again
        self.tensors = []
        for peer in self.senders:
            self.slot.handle.put_signal(peer, WAS_TAKEN)
        self._is_taken = True

    def close(self) -> None:
        """Make room for the slot's next exchange, here and at those who took this one."""
        if not self._is_taken:
            self.sums()
            self.take()
        with torch.cuda.stream(self.copies.stream):
            for peer in self.takers:
                self.slot.handle.wait_signal(peer, WAS_TAKEN)

    def _wait(self) -> None:
        self.arrive()
        assert self._arrived is not None
        self._arrived.wait()

    def _pieces(self, row: Tensor) -> list[Tensor]:
        """Where the tensors lie in a row, each at a multiple of ALIGNED bytes."""
        begin, pieces = 0, []
        for shape in self.shapes:
            pieces.append(row[begin : begin + shape.numel()].view(shape))
            step = ALIGNED // self.dtype.itemsize
            begin += -(-shape.numel() // step) * step
        return pieces


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
