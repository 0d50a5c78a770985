"""Spooled articles → rows → HDF5 files, for each split, and the metadata about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apps.training.data.options import PrepareOptions
from apps.training.data.packing import Overflow, Packer, Rows, fit
from apps.training.data.split import Split, Stretches, cut_tails, in_shuffled_order
from apps.training.data.spool import Spool
from apps.training.data.statistics import UnigramCounts
from apps.training.data.tokenizer import Tokenizer
from apps.training.data.writing import SplitWriter
from apps.training.progress import Progress
from backends.errors import UserError

_TOKENS_AT_ONCE = 2**20  # packing needs some 50 bytes of memory for each


def write_splits(
    spool: Spool, split: Split, tokenizer: Tokenizer, options: PrepareOptions, folder: Path
) -> dict[str, Any]:
    """Write train and dev files and return what metadata.yaml says of them. UserError when no training row is left."""
    train, dev = (Stretches(spool.starts[part], spool.lengths[part]) for part in (split.train, split.dev))
    if split.cut:
        train, dev = cut_tails(train, options.dev_ratio)
        spool.separate_before(dev.starts, tokenizer.eos_id)
    if options.shuffle:
        train = in_shuffled_order(train, options.seed)
    unigrams = UnigramCounts(tokenizer.vocab_size)

    def write(name: str, stretches: Stretches, num_files: int, count: Callable[[Rows], None]) -> dict[str, Any]:
        packer = Packer(options.max_seq_length, tokenizer.pad_id, options.packing)
        writer = SplitWriter(folder, name, num_files, options.max_seq_length)
        with writer, Progress(int(stretches.lengths.sum()), f"packing {name}", "tokens") as progress:
            for rows in _pack(spool, stretches, packer, options.overflow):
                writer.write(rows)
                count(rows)
                progress.update(packer.counts.input_tokens - progress.done)
        return packer.counts.as_metadata(name) | {
            f"number_of_{'training' if name == 'train' else name}_files": writer.num_files,
            f"max_batch_size_{name}": writer.num_rows // writer.num_files if writer.num_files else None,
        }

    metadata = write("train", train, options.num_splits, unigrams.add_train)
    metadata |= write("dev", dev, options.num_dev_splits, unigrams.add_dev)
    if not metadata["train_sequences"]:
        raise UserError(
            f"Nothing is left to train on: all {metadata['train_input_tokens']} tokens were dropped, being in articles "
            f"longer than max_seq_length={options.max_seq_length} or in rows of prompts alone. "
            f"Use packing=full, overflow=truncate_right or longer rows."
        )
    train_bytes, train_tokens = (int(numbers[split.train].sum()) for numbers in (spool.num_bytes, spool.lengths))
    metadata["bytes_per_token"] = round(train_bytes / train_tokens, 4)
    return metadata | unigrams.as_metadata()


def _pack(spool: Spool, stretches: Stretches, packer: Packer, overflow: Overflow) -> Iterator[Rows]:
    """Rows of the stretches, a bounded number of tokens at a time, however long a stretch is."""
    if packer.packing == "full":
        stretches = _in_parts(stretches, _TOKENS_AT_ONCE)
    else:
        first, kept = fit(stretches.lengths, packer.max_seq_length, overflow)
        packer.drop(int(stretches.lengths.sum() - kept.sum()))
        stretches = Stretches((stretches.starts + first)[kept > 0], kept[kept > 0])
    portion = np.cumsum(stretches.lengths) // _TOKENS_AT_ONCE
    bounds = np.flatnonzero(np.diff(portion)) + 1
    for starts, lengths in zip(np.split(stretches.starts, bounds), np.split(stretches.lengths, bounds), strict=True):
        yield packer.add(spool.take(starts, lengths))
    yield packer.finish()


def _in_parts(stretches: Stretches, most: int) -> Stretches:
    """The same tokens in the same order, in stretches of at most `most`."""
    parts = -(-stretches.lengths // most)
    offsets = (np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)) * most
    rest = np.repeat(stretches.lengths, parts) - offsets
    return Stretches(np.repeat(stretches.starts, parts) + offsets, np.minimum(rest, most))
