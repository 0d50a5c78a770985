"""Gradients that travel together: gathered, sent to be summed, and received again, group by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from compiled.reduction import Gradients, addend

if TYPE_CHECKING:
    from apps.training.workers.peer_copies import Exchange, PeerCopies


class TouchedRows:
    """Rows of a matrix whose gradient is not zero on some worker; of an embedding, only these have to be summed.

    They are gathered over the workers of `group` while these go on. `rows` are this worker's, integers of any shape.
    """

    def __init__(self, rows: Sequence[Tensor], num_rows: int, group: dist.ProcessGroup) -> None:
        self.is_touched = torch.zeros(num_rows, dtype=torch.uint8)
        for each in rows:
            self.is_touched[each.flatten()] = 1
        self.work = dist.all_reduce(self.is_touched, op=dist.ReduceOp.MAX, group=group, async_op=True)

    def few(self) -> Tensor | None:
        """The rows of all workers, ascending; None when they are more than half of all: sending all is no dearer."""
        self.work.wait()
        rows = self.is_touched.nonzero().flatten()
        return rows if 2 * len(rows) <= len(self.is_touched) else None


@dataclass
class Bucket:
    """Some groups' gradients. `owner` is who gets their sum, None: everybody; `dtype` what they are summed in, None:
    the widest of them, at least float32.
    """

    owner: int | None
    dtype: torch.dtype | None
    nbytes: int = 0
    groups: list[tuple[int, Gradients]] = field(default_factory=list)
    narrowed: dict[int, tuple[Tensor, Gradients]] = field(default_factory=dict)  # rows that travel, and of what
    works: list[Any] = field(default_factory=list)

    def add(self, group: int, gradients: Gradients, rows: Tensor | None = None) -> None:
        """`rows`: those that travel, the others being zero on all workers."""
        if rows is not None:
            self.narrowed[group] = (rows, gradients)
            gradients = {name: gradient[rows] for name, gradient in gradients.items()}
        self.groups.append((group, gradients))
        for gradient in gradients.values():
            self.nbytes += gradient.numel() * (self.dtype or at_least_float32(gradient)).itemsize

    def send(self, group: dist.ProcessGroup, as_they_are: int) -> None:
        """Start the sum: of tensors of `as_they_are` bytes and more in place, of a copy of all others together.

        Two that share memory, as the gradients of A and B where A + B is the weight, are copied.
        """
        places = [(gradients, name) for _, gradients in self.groups for name in gradients]
        if not places:
            return
        dtypes = {self.dtype or at_least_float32(gradients[name]) for gradients, name in places}
        dtype = max(dtypes, key=lambda dtype: dtype.itemsize)
        uses = Counter(_memory_of(gradients[name]) for gradients, name in places)
        sent, copied = [], []
        for gradients, name in places:
            tensor = gradients[name]
            fits = tensor.dtype == dtype and tensor.is_contiguous() and uses[_memory_of(tensor)] == 1
            if fits and tensor.nbytes >= as_they_are:
                sent.append(tensor)
            else:
                copied.append((gradients, name))
        if copied:
            tensors = [gradients[name] for gradients, name in copied]
            flat = torch.empty(sum(map(torch.numel, tensors)), dtype=dtype, device=tensors[0].device)
            pieces = views(flat, tensors)
            torch._foreach_copy_(pieces, tensors)
            for (gradients, name), piece in zip(copied, pieces, strict=True):
                gradients[name] = piece
            sent.append(flat)
        self.works = [self._begin_sum(tensor, group) for tensor in sent]

    def _begin_sum(self, tensor: Tensor, group: dist.ProcessGroup) -> Any:
        if self.owner is None:
            return dist.all_reduce(tensor, group=group, async_op=True)
        return dist.reduce(tensor, group=group, group_dst=self.owner, async_op=True)

    def receive(self, pairs: bool = False) -> Iterator[tuple[int, Gradients]]:
        """Wait for the sums; each group with its own, in at least float32. `pairs`: the sums may be left to be done."""
        for work in self.works:
            work.wait()
        for group, gradients in self.groups:
            summed = {name: gradient.to(at_least_float32(gradient)) for name, gradient in gradients.items()}
            if group in self.narrowed:
                rows, whole = self.narrowed[group]
                summed = {name: whole[name].to(sums.dtype).index_copy_(0, rows, sums) for name, sums in summed.items()}
            yield group, summed


@dataclass
class CopiedBucket(Bucket):
    """Gradients that are copied from worker to worker, and added up by each."""

    copies: PeerCopies | None = None
    exchange: Exchange | None = None

    def send(self, group: dist.ProcessGroup, as_they_are: int) -> None:
        """Copy all gradients to where the others take them from; they may not be written to any more."""
        assert self.copies is not None
        tensors = [gradient for _, gradients in self.groups for gradient in gradients.values()]
        if tensors:
            dtype = max((self.dtype or tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)
            self.exchange = self.copies.open([tensor.to(dtype).contiguous() for tensor in tensors], self.owner)
            self.copies.start(self.exchange)

    def receive(self, pairs: bool = False) -> Iterator[tuple[int, Gradients]]:
        """Each group with its sums, in at least float32; without any where another worker owns them.

        `pairs`: with both workers' gradients instead, where there are two and they travelled as they were.
        """
        columns = [] if self.exchange is None else self._columns(self.exchange, pairs)
        rows = zip(*columns, strict=True)
        for group, gradients in self.groups:
            received: Gradients = {}
            for name in gradients if columns else ():
                received[name], *other = next(rows)
                received |= {addend(name): each for each in other}
            yield group, received
        if self.exchange is not None:
            self.exchange.take()

    def _columns(self, exchange: Exchange, pairs: bool) -> list[list[Tensor]]:
        """Sums, or two workers' gradients, or nothing; in the order of the groups."""
        sent = (gradient.dtype for _, gradients in self.groups for gradient in gradients.values())
        pair = exchange.pair() if pairs and all(dtype == exchange.dtype for dtype in sent) else None
        return pair or [sums for sums in [exchange.sums()] if sums]


def _memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def at_least_float32(gradient: Tensor) -> torch.dtype:
    return torch.promote_types(gradient.dtype, torch.float32)


def views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Pieces of `flat`, one behind the other, in the shapes of `like`."""
    pieces = flat.split([tensor.numel() for tensor in like])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True)]
