"""Tensors into a safetensors file as a stream: no second copy in memory, hashed on the way, flushed to the disk.

The format: the header's length (8 bytes, little-endian), the header (JSON: name → dtype, shape, begin and end), the
tensors' bytes one behind another. Python's lock is free while bytes are hashed and written, so a training thread
beside the writer is not held up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CHUNK = 2**22  # bytes hashed and written at a time: large against a system call, small against a processor's cache
PIECE = 2**27  # bytes fetched from a device at a time: while a CUDA graph is launched, each call may wait a whole step
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], read: HostBytes, metadata: Mapping[str, str] | None = None
) -> FileFacts:
    """Write `tensors` (contiguous, on any device) to `path` and wait until they are on the disk. Raises OSError."""
    ordered = {name: tensors[name] for name in write_order(tensors)}
    runs = _runs(ordered.values())
    return write_file(path, _joined(_header(ordered, metadata), (part for run in runs for part in read(run))))


def write_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Wide ones first: each tensor then begins at a multiple of its own width. Memory in this order is read fastest."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> FileFacts:
    """Write `parts` to `path`, hashing them, and wait until they are on the disk. Raises OSError."""
    digest, total = hashlib.sha256(), 0
    with open(path, "wb", buffering=0) as file:
        for part in parts:
            digest.update(part)
            rest = memoryview(part)
            total += len(rest)
            while len(rest):  # an unbuffered write may take less than it is given
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return FileFacts(total, digest.hexdigest())


class HostBytes:
    """The bytes of a tensor, in pieces, on the host.

    Those of a CUDA tensor come through two pinned buffers on a stream of its own: one is being filled while the other
    is written, and neither the device's other work nor another thread waits.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pinned: list[Tensor] = []

    def prepare(self, nbytes: int) -> None:
        """Pin memory for tensors of `nbytes` on a GPU now: in the middle of training it would hold up a step."""
        self._open(min(PIECE, nbytes))

    def __call__(self, tensor: Tensor) -> Iterator[memoryview]:
        """Yield the tensor's bytes; a piece is valid until the next one is asked for."""
        flat = _flat_bytes(tensor)
        pieces = [flat] if tensor.device.type == "cpu" else self._from_device(flat)
        for piece in pieces:
            whole = memoryview(piece.numpy())  # type: ignore[arg-type]
            yield from (whole[begin : begin + CHUNK] for begin in range(0, len(whole), CHUNK))

    def _from_device(self, flat: Tensor) -> Iterator[Tensor]:
        self._open(min(PIECE, flat.numel()))
        pieces = flat.split(self._pinned[0].numel())
        copied = self._copy(pieces[0], 0)
        for number, piece in enumerate(pieces):
            done = copied
            if number + 1 < len(pieces):
                copied = self._copy(pieces[number + 1], number + 1)
            done.synchronize()
            yield self._pinned[number % 2][: piece.numel()]

    def _copy(self, piece: Tensor, number: int) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            self._pinned[number % 2][: piece.numel()].copy_(piece, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # a core that spins is one that training lacks
            event.record()
        return event

    def _open(self, nbytes: int) -> None:
        """Make the stream and two buffers of at least `nbytes`; nothing is on its way through them."""
        self._stream = self._stream or torch.cuda.Stream()
        if not self._pinned or self._pinned[0].numel() < nbytes:
            self._pinned = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]


def _runs(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors' bytes as flat tensors in the same order; those that lie one behind another in memory are one."""
    run = torch.empty(0, dtype=torch.uint8)
    for flat in (_flat_bytes(tensor) for tensor in tensors if tensor.numel()):
        if _memory(run) == _memory(flat) and run.data_ptr() + run.numel() == flat.data_ptr():
            run = run.as_strided((run.numel() + flat.numel(),), (1,))
        else:
            if run.numel():
                yield run
            run = flat
    if run.numel():
        yield run


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _flat_bytes(tensor: Tensor) -> Tensor:
    assert tensor.is_contiguous()
    return tensor.detach().view(-1).view(torch.uint8)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, tensor in tensors.items():
        end = begin + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _joined(first: bytes, rest: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
    yield first
    yield from rest
