"""The rows of one split of a dataset, spread over HDF5 files, read a few at a time.

gzip unpacks whole chunks, so a read fetches a block of rows (as many as a chunk has) and keeps the latest blocks in
memory up to a budget. Measured on one core, S = 256, both datasets, cold: our own chunks (16 KiB) 0.08 ms a random row;
h5py's automatic chunks, as other writers leave them, 2.4 ms. So our files need no cache to outrun a GPU, others get by
with it, and neither is ever read whole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.training.data.packing import Rows
from backends.errors import UserError

DATASETS = ("input_ids", "token_type_ids")
CACHE_BYTES = 256 * 2**20
_OPEN_FILES = 64  # file handles kept; a dataset may have thousands of files

AGAIN = "Prepare the dataset again with apps/prepare_data.py."


@dataclass(frozen=True)
class RowFile:
    """One HDF5 file: how many rows it has, and how many of them a chunk holds."""

    path: Path
    num_rows: int
    chunk_rows: int


def inspect(path: Path, max_seq_length: int) -> RowFile:
    """Check that `path` is a whole HDF5 file of rows of max_seq_length; UserError tells what else it is."""
    import h5py

    try:
        with h5py.File(path) as file:
            shapes = {}
            for name in DATASETS:
                data = file.get(name)
                if not isinstance(data, h5py.Dataset):
                    raise UserError(f"'{path}' has no dataset '{name}': expected {' and '.join(DATASETS)}. {AGAIN}")
                if data.ndim != 2 or data.dtype.kind not in "iu":
                    what = f"{data.dtype} {list(data.shape)}"
                    raise UserError(f"'{name}' in '{path}' is {what}: expected int32 [rows, {max_seq_length}]. {AGAIN}")
                shapes[name] = data.shape
            if shapes[DATASETS[0]] != shapes[DATASETS[1]]:
                raise UserError(f"The datasets in '{path}' differ in shape: {shapes}. {AGAIN}")
            rows, length = shapes[DATASETS[0]]
            if length != max_seq_length:
                raise UserError(
                    f"'{path}' has rows of {length} tokens, its metadata.yaml says {max_seq_length}. {AGAIN}"
                )
            chunks = file[DATASETS[0]].chunks
            return RowFile(path, rows, chunks[0] if chunks else max(1, 4096 // max_seq_length))
    except OSError as error:
        raise UserError(f"'{path}' is not a whole HDF5 file ({_reason(error)}). {AGAIN}") from error


class RowFiles:
    """Random access to the rows of several files, numbered through in the order of the files. Safe between threads.

    Every token id is checked against `vocab_size` when its block is read: a stray id would index past the embedding.
    """

    def __init__(
        self, files: Sequence[RowFile], max_seq_length: int, vocab_size: int | None, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.files, self.max_seq_length, self.vocab_size = tuple(files), max_seq_length, vocab_size
        self._starts = np.cumsum([0, *(file.num_rows for file in self.files)])
        self._blocks: OrderedDict[tuple[int, int], Rows] = OrderedDict()
        self._budget = self._room = cache_bytes
        self._handles: OrderedDict[Path, Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def read(self, rows: np.ndarray) -> Rows:
        """Return the rows of these numbers, int32 [len(rows), S] each. Raises UserError for damaged files."""
        out = Rows(*(np.empty((len(rows), self.max_seq_length), np.int32) for _ in DATASETS))
        if not len(rows):
            return out
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[numbers]
        chunk_rows = np.array([file.chunk_rows for file in self.files])[numbers]
        blocks, block_of_row = np.unique(np.stack([numbers, places // chunk_rows]), axis=1, return_inverse=True)
        with self._lock:
            for index, (number, block) in enumerate(blocks.T.tolist()):
                wanted = np.flatnonzero(block_of_row == index)
                found = self._block(number, block)
                inside = places[wanted] % chunk_rows[wanted]
                out.input_ids[wanted], out.token_type_ids[wanted] = (part[inside] for part in found)
        return out

    def _block(self, number: int, block: int) -> Rows:
        key = (number, block)
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        found = self._load(self.files[number], block)
        self._blocks[key] = found
        self._room -= sum(part.nbytes for part in found)
        while self._room < 0 and len(self._blocks) > 1:
            _, oldest = self._blocks.popitem(last=False)
            self._room += sum(part.nbytes for part in oldest)
        return found

    def _load(self, file: RowFile, block: int) -> Rows:
        first = block * file.chunk_rows
        try:
            handle = self._open(file.path)
            ids, types = (handle[name][first : first + file.chunk_rows] for name in DATASETS)
        except (OSError, KeyError) as error:
            raise UserError(f"Cannot read rows from {first} of '{file.path}' ({_reason(error)}). {AGAIN}") from error
        limit = self.vocab_size
        if limit is not None and (ids.min() < 0 or ids.max() >= limit):
            worst = ids.max() if ids.max() >= limit else ids.min()
            raise UserError(
                f"'{file.path}' holds token id {worst} near row {first}: expected 0 to {limit - 1}. {AGAIN}"
            )
        if types.min() < 0 or types.max() > 3:
            raise UserError(f"'{file.path}' holds a token type other than 0 to 3 near row {first}. {AGAIN}")
        return Rows(ids.astype(np.int32, copy=False), types.astype(np.int8))

    def _open(self, path: Path) -> Any:
        """The handle of `path`; the longest unused is closed when there are too many."""
        import h5py

        if path not in self._handles:
            with ExitStack() as closing:
                while len(self._handles) >= _OPEN_FILES:
                    closing.callback(self._handles.popitem(last=False)[1].close)
            self._handles[path] = h5py.File(path, rdcc_nbytes=0)  # we keep blocks ourselves
        self._handles.move_to_end(path)
        return self._handles[path]


def _reason(error: Exception) -> str:
    """The part of HDF5's message that a person can use."""
    message = str(error).strip("'\"")
    return message[message.find("(") + 1 : message.rfind(")")] if "(" in message and ")" in message else message
