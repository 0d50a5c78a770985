"""Articles of any length → rows of exactly S tokens.

- full: articles one after another; one that does not fit goes on in the next row. No padding but in the last row.
- greedy: whole articles, as many as fit in the row in the order they come; the rest of the row is padding.
- single: one article a row.

In greedy and single an article longer than a row is dropped, or loses its beginning (truncate_left) or end
(truncate_right). A row without any completion token teaches nothing and is left out. All of it is numpy: a Python loop
runs once a row, never once a token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import numpy as np

from apps.training.data.token_types import TokenType

Packing = Literal["full", "greedy", "single"]
Overflow = Literal["drop", "truncate_left", "truncate_right"]


class Rows(NamedTuple):
    """Rows of a dataset. Both int32 [rows, S]."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray


class Articles(NamedTuple):
    """Articles end to end: ids int32 [tokens], types int8 [tokens], lengths int64 [articles]."""

    ids: np.ndarray
    types: np.ndarray
    lengths: np.ndarray


@dataclass
class Counts:
    """What went in and came out. input = prompt + completion + both kinds of dropped tokens.

    As in generative_data_prep a separator counts as a completion token, and articles are counted by their separators.
    """

    input_tokens: int = 0
    output_tokens: int = 0  # padding included
    prompt_tokens: int = 0
    completion_tokens: int = 0
    padding_tokens: int = 0
    sequences: int = 0
    articles: int = 0
    tokens_dropped_from_packing: int = 0
    tokens_dropped_from_all_prompt: int = 0

    def as_metadata(self, split: str) -> dict[str, int]:
        """The counts under their names in metadata.yaml: train_sequences, …"""
        return {f"{split}_{name}": int(value) for name, value in asdict(self).items()}


class Packer:
    """Packs articles that come in portions; the rows do not depend on how they were portioned.

    In greedy and single every article must have at most max_seq_length tokens: see fit().
    """

    def __init__(self, max_seq_length: int, pad_id: int, packing: Packing = "full") -> None:
        self.max_seq_length, self.pad_id, self.packing = max_seq_length, pad_id, packing
        self.counts = Counts()
        self._rest = Articles(np.empty(0, np.int32), np.empty(0, np.int8), np.empty(0, np.int64))

    def drop(self, num_tokens: int) -> None:
        """Count tokens that were left out because their article was too long."""
        self.counts.input_tokens += num_tokens
        self.counts.tokens_dropped_from_packing += num_tokens

    def add(self, articles: Articles) -> Rows:
        """Return the rows that `articles`, after what was left from before, complete."""
        assert self.packing == "full" or (articles.lengths <= self.max_seq_length).all()
        self.counts.input_tokens += len(articles.ids)
        return self._pack(_concatenate(self._rest, articles), last=False)

    def finish(self) -> Rows:
        """Return the last row, padded."""
        return self._pack(self._rest, last=True)

    def _pack(self, articles: Articles, last: bool) -> Rows:
        """Lay out what is complete (all of it when `last`) and keep the rest."""
        row_of, num_rows = _lay_out(articles.lengths, self.max_seq_length, self.packing)
        if not last and self.packing != "single" and num_rows:
            num_rows -= 1  # the last row may still take more
        if self.packing == "full":
            size = len(articles.ids) if last else num_rows * self.max_seq_length
            taken = Articles(articles.ids[:size], articles.types[:size], np.array([size]))
            self._rest = Articles(articles.ids[size:], articles.types[size:], np.array([len(articles.ids) - size]))
            places = np.arange(size)
        else:
            count = int(np.searchsorted(row_of, num_rows))
            taken, self._rest = _split(articles, count)
            places = _places(taken.lengths, row_of[:count], self.max_seq_length)
        return self._count(self._fill(taken, places, num_rows))

    def _fill(self, articles: Articles, places: np.ndarray, num_rows: int) -> Rows:
        ids = np.full((num_rows, self.max_seq_length), self.pad_id, np.int32)
        types = np.full((num_rows, self.max_seq_length), TokenType.PADDING, np.int32)
        ids.flat[places], types.flat[places] = articles.ids, articles.types
        return Rows(ids, types)

    def _count(self, rows: Rows) -> Rows:
        """Leave out the rows without completion, and count the tokens of both kinds of rows."""
        useful = (rows.token_type_ids == TokenType.COMPLETION).any(axis=1)
        dropped = rows.token_type_ids[~useful]
        kept = Rows(rows.input_ids[useful], rows.token_type_ids[useful])
        of_type = np.bincount(kept.token_type_ids.ravel(), minlength=4)
        counts = self.counts
        counts.output_tokens += kept.input_ids.size
        counts.prompt_tokens += int(of_type[TokenType.PROMPT])
        counts.completion_tokens += int(of_type[TokenType.COMPLETION] + of_type[TokenType.SEPARATOR])
        counts.padding_tokens += int(of_type[TokenType.PADDING])
        counts.sequences += len(kept.input_ids)
        counts.articles += int(of_type[TokenType.SEPARATOR])
        counts.tokens_dropped_from_all_prompt += int((dropped != TokenType.PADDING).sum())
        return kept


def fit(lengths: np.ndarray, max_seq_length: int, overflow: Overflow) -> tuple[np.ndarray, np.ndarray]:
    """Return, for articles of these lengths, the first token to keep and how many (0: the article is dropped)."""
    if overflow == "drop":
        return np.zeros_like(lengths), np.where(lengths > max_seq_length, 0, lengths)
    kept = np.minimum(lengths, max_seq_length)
    return lengths - kept if overflow == "truncate_left" else np.zeros_like(lengths), kept


def _lay_out(lengths: np.ndarray, max_seq_length: int, packing: Packing) -> tuple[np.ndarray, int]:
    """Return the row of each article (greedy and single) and the number of rows."""
    if packing == "full":
        return np.empty(0, np.int64), -(-int(lengths.sum()) // max_seq_length)
    if packing == "single":
        return np.arange(len(lengths)), len(lengths)
    ends = np.cumsum(lengths)
    row_of = np.empty(len(lengths), np.int64)
    row, article, filled = 0, 0, 0
    while article < len(lengths):
        following = int(np.searchsorted(ends, filled + max_seq_length, side="right"))
        row_of[article:following] = row
        row, article, filled = row + 1, following, int(ends[following - 1])
    return row_of, row


def _places(lengths: np.ndarray, row_of: np.ndarray, max_seq_length: int) -> np.ndarray:
    """Where each token goes in the flattened rows: its row's start plus its distance from the row's first token."""
    starts = np.cumsum(lengths) - lengths
    first_of_row = np.searchsorted(row_of, row_of)  # the first article of each article's row
    offset = row_of * max_seq_length - starts[first_of_row] if len(starts) else starts
    return np.arange(int(lengths.sum())) + np.repeat(offset, lengths)


def _split(articles: Articles, count: int) -> tuple[Articles, Articles]:
    """The first `count` articles, and the others."""
    size = int(articles.lengths[:count].sum())
    first = Articles(articles.ids[:size], articles.types[:size], articles.lengths[:count])
    return first, Articles(articles.ids[size:], articles.types[size:], articles.lengths[count:])


def _concatenate(first: Articles, second: Articles) -> Articles:
    return Articles(*(np.concatenate(parts) for parts in zip(first, second, strict=True)))
