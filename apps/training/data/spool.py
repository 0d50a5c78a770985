"""Tokenized articles on disk, in the order they came, to be taken in any order. Memory: 16 bytes an article."""

from __future__ import annotations

from array import array
from pathlib import Path
from types import TracebackType

import numpy as np

from apps.training.data.encoding import EncodedPiece
from apps.training.data.packing import Articles
from apps.training.data.token_types import TokenType


class Spool:
    """Append pieces, then `finish()`, then `take(numbers)` articles. Needs 5 bytes of disk a token in `folder`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._paths = (folder / "ids", folder / "types")
        self._files = [path.open("wb") for path in self._paths]
        self._lengths, self._bytes = array("q"), array("q")
        self._open = [0, 0]  # tokens and bytes of the article not yet ended

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def append(self, piece: EncodedPiece) -> None:
        self._files[0].write(piece.ids.tobytes())
        self._files[1].write(piece.types.tobytes())
        self._open[0] += len(piece.ids)
        self._open[1] += piece.num_bytes
        if piece.last:
            self._lengths.append(self._open[0])
            self._bytes.append(self._open[1])
            self._open = [0, 0]

    def finish(self) -> None:
        """Make what was appended readable."""
        assert self._open == [0, 0], "the last article has not ended"
        for file in self._files:
            file.close()
        self.lengths = np.array(self._lengths, np.int64)
        self.num_bytes = np.array(self._bytes, np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._ids = np.memmap(self._paths[0], np.int32, "r+")
        self._types = np.memmap(self._paths[1], np.int8, "r+")

    def take(self, starts: np.ndarray, lengths: np.ndarray) -> Articles:
        """The stretches of `lengths` tokens from `starts`, one after another."""
        offsets = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        places = offsets + np.arange(int(lengths.sum()))
        return Articles(self._ids[places], self._types[places], lengths)

    def separate_before(self, starts: np.ndarray, eos_id: int) -> None:
        """Turn the token before each of `starts` into a separator: an article is cut there."""
        self._ids[starts - 1], self._types[starts - 1] = eos_id, TokenType.SEPARATOR
