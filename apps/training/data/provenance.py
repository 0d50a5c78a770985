"""What a dataset was made from and how, so that it can be made again and two can be told apart."""

from __future__ import annotations

import hashlib
import json
import platform
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.training.data import corpus
from apps.training.data.options import PrepareOptions
from apps.training.data.sources import Source
from apps.training.data.writing import sha256_of_file
from apps.training.progress import Progress
from backends.errors import UserError


@dataclass(frozen=True)
class Content:
    """What a source holds. sizes: UTF-8 bytes of each article, int64. sha256: of all texts and their types."""

    sizes: np.ndarray
    sha256: str

    @property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())


def read_through(source: Source) -> Content:
    """Read everything once, so that a bad line shows before anything is written. UserError when there is no text."""
    sizes, size = array("q"), 0
    digest = hashlib.sha256()
    with Progress(source.num_bytes, "reading", "bytes") as progress:
        for piece in source.pieces():
            texts = [segment.text.encode() for segment in piece.segments]
            for segment, text in zip(piece.segments, texts, strict=True):
                digest.update(f"{len(text)} {segment.type:d} {segment.end:d}\n".encode())
                digest.update(text)
            size += sum(map(len, texts))
            progress.update(sum(map(len, texts)))
            if piece.last:
                sizes.append(size)
                size = 0
    if not sizes:
        raise UserError(f"'{source.name}' holds no text to learn from. Expected at least one article.")
    return Content(np.array(sizes, np.int64), digest.hexdigest())


def origin(source: Source, content: Content, options: PrepareOptions) -> dict[str, Any]:
    """The part of metadata.yaml about input and settings."""
    embedded = {"python_version": platform.python_version()} if options.input == corpus.NAME else {}
    return embedded | {
        "max_seq_length": options.max_seq_length,
        "token_type_ids": True,
        "input": source.name,
        "input_articles": len(content.sizes),
        "input_bytes": content.num_bytes,
        "input_sha256": content.sha256,
        "packing": options.packing,
        "overflow": options.overflow if options.packing != "full" else None,
        "shuffle": options.shuffle,
        "seed": options.seed,
        "dev_ratio": options.dev_ratio,
        "test_ratio": options.test_ratio,
    }


def write_inputs(source: Source, folder: Path) -> None:
    """Write sha256/inputs.json: name, size and sha256 of each file read."""
    if source.files:
        known = {name: {"sha256": sha256_of_file(path), "size": path.stat().st_size} for name, path in source.files}
        (folder / "sha256" / "inputs.json").write_text(json.dumps(known, indent=1), encoding="utf-8")
