"""Writing a dataset folder that the reference reader reads as well (layout: storage.py)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from apps.training.data.packing import Rows
from apps.training.data.row_files import DATASETS
from apps.training.data.storage import METADATA
from backends.errors import UserError

# 16 KiB: reading one random row unpacks little (row_files.py has the figures), and files are only 10 % larger than
# with chunks of 1 MiB. A higher gzip level or the shuffle filter saves 5 % more and costs reading time.
CHUNK_TOKENS = 4096


class SplitWriter:
    """Writes rows to `{split}_1_of_N.hdf5` …, row i to file i mod N, so that files differ by one row at most.

    `close()` gives the files their names: with fewer rows than files there are fewer files.
    """

    def __init__(self, folder: Path, split: str, num_files: int, max_seq_length: int) -> None:
        import h5py

        self.folder, self.split, self.num_rows, self.num_files = folder, split, 0, num_files
        self._chunk_rows = max(1, CHUNK_TOKENS // max_seq_length)
        self._parts = [folder / f".{split}-{number}" for number in range(num_files)]
        self._files: list[Any] = []
        self._waiting: list[list[Rows]] = [[] for _ in self._parts]
        shape, most, chunks = (0, max_seq_length), (None, max_seq_length), (self._chunk_rows, max_seq_length)
        try:
            for number, path in enumerate(self._parts):
                with self._plain_errors(number):
                    # Without a cache a chunk is written at once: HDF5 says nothing of one it cannot write later.
                    file = h5py.File(path, "w", rdcc_nbytes=0)
                    self._files.append(file)
                    for name in DATASETS:
                        file.create_dataset(name, shape, np.int32, maxshape=most, chunks=chunks, compression="gzip")
        except BaseException:
            self._let_go()
            raise

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self._let_go()

    def write(self, rows: Rows) -> None:
        """Append rows, int32 [n, S] each."""
        count = len(self._files)
        for number, waiting in enumerate(self._waiting):
            mine = slice((number - self.num_rows) % count, None, count)
            waiting.append(Rows(*(part[mine] for part in rows)))
            self._flush(number, whole_chunks=True)
        self.num_rows += len(rows.input_ids)

    def close(self) -> list[Path]:
        """Write what is left and return the files, named."""
        for number, file in enumerate(self._files):
            self._flush(number, whole_chunks=False)
            with self._plain_errors(number):
                file.close()
        used = self.num_files = min(self.num_rows, len(self._parts))
        for part in self._parts[used:]:
            part.unlink(missing_ok=True)
        names = [self.folder / f"{self.split}_{number + 1}_of_{used}.hdf5" for number in range(used)]
        for part, name in zip(self._parts, names, strict=False):
            if part.exists():
                part.rename(name)
        return names

    def _flush(self, number: int, whole_chunks: bool) -> None:
        """Write the waiting rows of a file; a chunk written twice would be packed twice."""
        waiting = self._waiting[number]
        ready = sum(len(rows.input_ids) for rows in waiting)
        if whole_chunks:
            ready -= ready % self._chunk_rows
        if not ready:
            return
        whole = [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
        with self._plain_errors(number):
            for name, data in zip(DATASETS, whole, strict=True):
                stored = self._files[number][name]
                stored.resize(len(stored) + ready, axis=0)
                stored[-ready:] = data[:ready]
        self._waiting[number] = [Rows(*(data[ready:] for data in whole))]

    @contextmanager
    def _plain_errors(self, number: int) -> Iterator[None]:
        """The system's error of file `number`: HDF5's own is a page of text, and a RuntimeError where it closes."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            found = re.search(r"errno = (\d+)", str(error))
            if found is None:
                raise
            code = int(found[1])
            if code in (errno.EMFILE, errno.ENFILE):
                setting = "num_splits" if self.split == "train" else f"num_{self.split}_splits"
                raise UserError(
                    f"{setting}={self.num_files} files cannot all be open at once: the system allows {number} here. "
                    f"Use fewer, or allow more by 'ulimit -n {self.num_files + 100}'."
                ) from error
            raise OSError(code, os.strerror(code), str(self._parts[number])) from error

    def _let_go(self) -> None:
        for file in self._files:
            with suppress(OSError, RuntimeError):  # the disk may be full; the first error is the one to show
                file.close()


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write metadata.yaml, keys sorted."""
    import yaml

    (folder / METADATA).write_text(yaml.safe_dump(dict(metadata), default_flow_style=False), encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Write sha256/files_metadata.json: sha256 and size of every file of the folder.

    `modified_time` is 0 for all: readers compare it only to skip hashing, and a real one would make two equal datasets
    differ.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent.name != "sha256")
    known = {
        path.relative_to(folder).as_posix(): {
            "sha256": sha256_of_file(path),
            "size": path.stat().st_size,
            "modified_time": 0.0,
        }
        for path in files
    }
    (folder / "sha256").mkdir(exist_ok=True)
    (folder / "sha256" / "files_metadata.json").write_text(json.dumps(known, indent=1), encoding="utf-8")


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
