"""The story of making a dataset: read, split, train a tokenizer, tokenize, pack, write.

The input is read anew for each step rather than held in memory; tokens wait on disk (spool.py).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.training.data.articles import Piece, Style
from apps.training.data.assemble import write_splits
from apps.training.data.encoding import encode
from apps.training.data.options import PrepareOptions
from apps.training.data.provenance import Content, origin, read_through, write_inputs
from apps.training.data.sources import Source, open_source
from apps.training.data.split import Split, split_articles
from apps.training.data.spool import Spool
from apps.training.data.storage import METADATA
from apps.training.data.tokenizer import Tokenizer, check_vocab_size, copy_tokenizer, load_tokenizer, train_tokenizer
from apps.training.data.writing import write_checksums, write_metadata
from apps.training.files import atomic_folder, is_filled, require_writable
from apps.training.progress import Progress
from backends.errors import UserError

_TOKENIZER_BYTES = 64 * 2**20  # a BPE learns little from more text, but needs time and memory for it
_DEFAULT_VOCAB = 8192  # as much as 10 MB of text feed well


@dataclass(frozen=True)
class Prepared:
    """A finished dataset, and what its metadata.yaml says."""

    folder: Path
    metadata: Mapping[str, Any]


def prepare(options: PrepareOptions) -> Prepared:
    """Make the dataset. Raises UserError, leaving nothing behind, when input or settings are wrong."""
    folder = options.folder
    _refuse_other_things(folder, options.overwrite)
    require_writable(folder, "output_dir")
    given = None if options.tokenizer == "train" else load_tokenizer(options.tokenizer)
    if given is None:
        check_vocab_size(options.vocab_size)
    source = open_source(
        options.input,
        _style(options, given),
        split=options.input_split,
        subset=options.input_subset,
        skips_undecodable=options.skip_undecodable,
    )
    content = read_through(source)
    split = split_articles(content.sizes, options.dev_ratio, options.test_ratio, options.seed)
    with atomic_folder(folder, overwrite=options.overwrite) as place:
        if given is None:
            tokenizer = _train_tokenizer(source, content, split, options.vocab_size, place / "tokenizer")
        else:
            tokenizer = given
            copy_tokenizer(options.tokenizer, place / "tokenizer")
        with Spool(place / ".spool") as spool:
            _tokenize(source, content, tokenizer, options.workers or os.cpu_count() or 1, spool)
            metadata = write_splits(spool, split, tokenizer, options, place)
        shutil.rmtree(place / ".spool")
        metadata |= tokenizer.as_metadata() | origin(source, content, options)
        if source.left_out:
            metadata["number_of_files_left_out"] = len(source.left_out)
        metadata["number_of_test_files"] = _write_test_articles(source, split, place)
        write_metadata(place, metadata)
        write_checksums(place)
        write_inputs(source, place)
    return Prepared(folder, metadata)


def default_dataset(max_seq_length: int, vocab_size: int) -> Path:
    """The folder of the embedded corpus' dataset for a model with this vocabulary; it is made when it is not there."""
    options = PrepareOptions(max_seq_length=max_seq_length, vocab_size=min(vocab_size, _DEFAULT_VOCAB))
    if not is_filled(options.folder):
        print(f"Preparing the embedded corpus as {options.folder}/", flush=True)
        try:
            prepare(options)
        except UserError:
            if not is_filled(options.folder):  # otherwise another process made it meanwhile
                raise
    return options.folder


def _refuse_other_things(folder: Path, overwrite: bool) -> None:
    """Only a dataset may be replaced, and only when told: a mistyped output_dir must not cost anybody a folder."""
    if not is_filled(folder):
        return
    if not overwrite:
        raise UserError(f"'{folder}' is not empty. Give another output_dir, or replace it with overwrite=true.")
    if not (folder / METADATA).is_file():
        raise UserError(
            f"'{folder}' is not empty and no dataset, so overwrite=true spares it. Give another output_dir."
        )


def _style(options: PrepareOptions, tokenizer: Tokenizer | None) -> Style:
    render = tokenizer.render if tokenizer is not None and tokenizer.chat is not None else None
    if options.chat_template == "all" and render is None:
        raise UserError(f"chat_template=all, but the tokenizer '{options.tokenizer}' has none. Use auto or plain.")
    return Style(
        text_keyword=options.text_keyword,
        prompt_keyword=options.prompt_keyword,
        completion_keyword=options.completion_keyword,
        space_separator=options.space_separator,
        render=None if options.chat_template == "plain" else render,
        render_pairs=options.chat_template == "all",
    )


def _train_tokenizer(source: Source, content: Content, split: Split, vocab_size: int, folder: Path) -> Tokenizer:
    """Train on the training articles; on every n-th part of them when there is much more than a BPE needs."""
    num_bytes = int(content.sizes[split.train].sum())
    stride = -(-num_bytes // _TOKENIZER_BYTES)

    def texts() -> Iterator[str]:
        with Progress(num_bytes, "training the tokenizer", "bytes") as progress:
            for number, piece in enumerate(_of_articles(source, split.train)):
                progress.update(sum(len(segment.text.encode()) for segment in piece.segments))
                if number % stride == 0:
                    yield from (segment.text for segment in piece.segments)

    return train_tokenizer(texts(), vocab_size, folder)


def _tokenize(source: Source, content: Content, tokenizer: Tokenizer, workers: int, spool: Spool) -> None:
    with Progress(content.num_bytes, "tokenizing", "bytes") as progress:
        for piece in encode(source.pieces(), tokenizer, workers):
            spool.append(piece)
            progress.update(piece.num_bytes)
    spool.finish()
    if len(spool.lengths) != len(content.sizes):
        raise UserError(f"'{source.name}' changed while it was read. Prepare it again.")


def _write_test_articles(source: Source, split: Split, folder: Path) -> int:
    """Write the test articles as text, a JSON line each: {"text"}, or a list of {"prompt", "completion"}."""
    if not len(split.test):
        return 0
    (folder / "test_files").mkdir()
    with (folder / "test_files" / "test_1_of_1.jsonl").open("w", encoding="utf-8") as file:
        for piece in _of_articles(source, split.test):
            texts = [segment.text for segment in piece.segments]
            if len(texts) == 1:  # raw text, perhaps one part of many
                opening, closing = '{"text": "' if piece.first else "", '"}\n' if piece.last else ""
                file.write(f"{opening}{json.dumps(texts[0], ensure_ascii=False)[1:-1]}{closing}")
            else:
                pairs = zip(texts[::2], texts[1::2], strict=True)
                record = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return 1


def _of_articles(source: Source, numbers: np.ndarray) -> Iterator[Piece]:
    """The pieces of the articles of these sorted numbers."""
    wanted = iter(numbers.tolist())
    following, number = next(wanted, None), 0
    for piece in source.pieces():
        if number == following:
            yield piece
        if piece.last:
            following = next(wanted, None) if number == following else following
            number += 1
