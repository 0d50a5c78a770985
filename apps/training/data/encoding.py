"""Pieces of text → tokens with types, on several threads (the tokenizer releases Python's lock), in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from apps.training.data.articles import Piece
from apps.training.data.token_types import TokenType
from apps.training.data.tokenizer import Tokenizer

_GROUP_CHARACTERS = 2**18  # enough for a thread to be worth waking, small enough to keep all busy


class EncodedPiece(NamedTuple):
    """ids int32 and types int8, both [tokens]; `last` ends an article; num_bytes is the text's length in UTF-8."""

    ids: np.ndarray
    types: np.ndarray
    last: bool
    num_bytes: int


def encode(pieces: Iterable[Piece], tokenizer: Tokenizer, workers: int) -> Iterator[EncodedPiece]:
    """Tokenize `pieces` on `workers` threads; the result does not depend on how many. Holds a few groups at a time."""
    waiting: deque[Future[list[EncodedPiece]]] = deque()
    with _own_threads_only(), ThreadPoolExecutor(workers, thread_name_prefix="tokenize") as pool:
        try:
            for group in _groups(pieces):
                waiting.append(pool.submit(_encode_group, group, tokenizer))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += sum(len(segment.text) for segment in piece.segments)
        if size >= _GROUP_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def _encode_group(group: list[Piece], tokenizer: Tokenizer) -> list[EncodedPiece]:
    texts = [segment.text for piece in group for segment in piece.segments]
    encodings = iter(tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False))
    return [_assemble(piece, [next(encodings).ids for _ in piece.segments], tokenizer) for piece in group]


def _assemble(piece: Piece, encoded: list[list[int]], tokenizer: Tokenizer) -> EncodedPiece:
    """Join the segments' tokens, with EOS after those that end in one and a separator after the article."""
    ids: list[int] = []
    types: list[np.ndarray] = []
    bos = tokenizer.bos_id
    if piece.first and bos is not None and encoded[0][:1] != [bos]:  # a chat template may have written it already
        encoded[0].insert(0, bos)
    for segment, tokens in zip(piece.segments, encoded, strict=True):
        ids += tokens
        types.append(np.full(len(tokens), segment.type, np.int8))
        if segment.end:
            ids.append(tokenizer.eos_id)
            types.append(np.array([TokenType.COMPLETION], np.int8))
    if piece.last and ids[-1:] != [tokenizer.eos_id]:  # a template may close with a token of its own
        ids.append(tokenizer.eos_id)
        types.append(np.array([TokenType.COMPLETION], np.int8))
    joined = np.concatenate(types)
    if piece.last:
        joined[-1] = TokenType.SEPARATOR
    num_bytes = sum(len(segment.text.encode()) for segment in piece.segments)
    return EncodedPiece(np.array(ids, np.int32), joined, piece.last, num_bytes)


@contextmanager
def _own_threads_only() -> Iterator[None]:
    """Keep the tokenizers package from spreading each of our threads' work over all cores once more."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
