"""Packing against the obvious slow way: one article after another, one token after another."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.data.packing import Articles, Packer, fit
from apps.training.data.token_types import TokenType

PAD = -1


def slow_rows(articles, length, packing, overflow):
    """Lists of (id, type) pairs a row, written to be read, not to be fast. Also the tokens dropped as too long."""
    rows, row, dropped = [], [], 0
    for article in articles:
        if packing == "full":
            for token in article:
                if len(row) == length:
                    rows.append(row)
                    row = []
                row.append(token)
            continue
        if len(article) > length:
            dropped += len(article) if overflow == "drop" else len(article) - length
            article = {"drop": [], "truncate_left": article[-length:], "truncate_right": article[:length]}[overflow]
        if not article:
            continue
        if row and (packing == "single" or len(row) + len(article) > length):
            rows.append(row)
            row = []
        row = row + article
    if row:
        rows.append(row)
    return [row + [(PAD, TokenType.PADDING)] * (length - len(row)) for row in rows], dropped


tokens = st.tuples(st.integers(0, 9), st.sampled_from([TokenType.PROMPT, TokenType.COMPLETION]))
some_articles = st.lists(
    st.lists(tokens, max_size=12).map(lambda article: [*article, (0, TokenType.SEPARATOR)]), max_size=12
)


def as_arrays(articles):
    flat = [token for article in articles for token in article]
    return Articles(
        np.array([token for token, _ in flat], np.int32),
        np.array([kind for _, kind in flat], np.int8),
        np.array([len(article) for article in articles], np.int64),
    )


@pytest.mark.parametrize("packing", ["full", "greedy", "single"])
@given(
    articles=some_articles,
    length=st.integers(1, 9),
    overflow=st.sampled_from(["drop", "truncate_left", "truncate_right"]),
    cuts=st.lists(st.integers(0, 12), max_size=4),
)
def test_same_rows_and_counts_as_the_slow_way_however_the_articles_are_portioned(
    packing, articles, length, overflow, cuts
):
    packer = Packer(length, PAD, packing)
    bounds = [0, *sorted(min(cut, len(articles)) for cut in cuts), len(articles)]
    portions = pack(packer, [articles[a:b] for a, b in pairwise(bounds)], overflow)
    got = [
        list(zip(ids.tolist(), types.tolist(), strict=True))
        for portion in portions
        for ids, types in zip(portion.input_ids, portion.token_type_ids, strict=True)
    ]
    rows, dropped_from_packing = slow_rows(articles, length, packing, overflow)
    useful = [row for row in rows if any(kind == TokenType.COMPLETION for _, kind in row)]
    useless = [row for row in rows if row not in useful]
    assert got == useful

    counts, flat = packer.counts, [kind for row in useful for _, kind in row]
    assert counts.sequences == len(useful)
    assert counts.output_tokens == len(useful) * length
    assert counts.prompt_tokens == flat.count(TokenType.PROMPT)
    assert counts.completion_tokens == flat.count(TokenType.COMPLETION) + flat.count(TokenType.SEPARATOR)
    assert counts.padding_tokens == flat.count(TokenType.PADDING)
    assert counts.articles == flat.count(TokenType.SEPARATOR)
    assert counts.tokens_dropped_from_packing == dropped_from_packing
    assert counts.tokens_dropped_from_all_prompt == sum(k != TokenType.PADDING for row in useless for _, k in row)
    assert (
        counts.input_tokens
        == sum(map(len, articles))
        == (
            counts.prompt_tokens
            + counts.completion_tokens
            + counts.tokens_dropped_from_packing
            + counts.tokens_dropped_from_all_prompt
        )
    )


def pack(packer, portions, overflow="drop"):
    """The rows of portions of articles, trimmed to fit where the packing asks for whole articles."""
    rows = []
    for portion in portions:
        if packer.packing != "full":
            first, kept = fit(
                np.array([len(article) for article in portion], np.int64), packer.max_seq_length, overflow
            )
            packer.drop(sum(map(len, portion)) - int(kept.sum()))
            portion = [a[start : start + size] for a, start, size in zip(portion, first, kept, strict=True) if size]
        rows.append(packer.add(as_arrays(portion)))
    return [*rows, packer.finish()]


def packed(packing, overflow="drop"):
    """Three articles of 2, 2 and 4 tokens into rows of 3."""
    one = TokenType.COMPLETION
    articles = [[(1, one), (2, one)], [(3, one), (4, one)], [(5, one), (6, one), (7, one), (8, one)]]
    return [row for rows in pack(Packer(3, PAD, packing), [articles], overflow) for row in rows.input_ids.tolist()]


def test_full_splits_articles_across_rows():
    assert packed("full") == [[1, 2, 3], [4, 5, 6], [7, 8, PAD]]


def test_greedy_keeps_articles_whole():
    assert packed("greedy") == [[1, 2, PAD], [3, 4, PAD]]
    assert packed("greedy", "truncate_left") == [[1, 2, PAD], [3, 4, PAD], [6, 7, 8]]
    assert packed("greedy", "truncate_right") == [[1, 2, PAD], [3, 4, PAD], [5, 6, 7]]


def test_single_never_shares_a_row():
    packer = Packer(4, PAD, "single")
    one = TokenType.COMPLETION
    rows = packer.add(as_arrays([[(1, one)], [(2, one), (3, one)]]))
    assert rows.input_ids.tolist() == [[1, PAD, PAD, PAD], [2, 3, PAD, PAD]]
    assert rows.token_type_ids.tolist() == [[1, 2, 2, 2], [1, 1, 2, 2]]


def test_rows_are_int32_as_the_layout_wants():
    rows = Packer(4, PAD).finish()
    assert (rows.input_ids.dtype, rows.token_type_ids.dtype, rows.input_ids.shape) == (np.int32, np.int32, (0, 4))
