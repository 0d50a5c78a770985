"""Spans of articles and the mask made of them, against a comparison of every pair of tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from backends.articles import article_mask, article_spans

LENGTHS = st.lists(st.integers(1, 6), min_size=1, max_size=6)


@given(LENGTHS, st.integers(0, 5))
def test_spans_and_mask_are_those_of_every_pair(lengths: list[int], padding: int) -> None:
    row = [number for number, length in enumerate(lengths, start=1) for _ in range(length)] + [0] * padding
    ids = torch.tensor([row, [1] * len(row)], dtype=torch.int32)
    same = ids[:, :, None] == ids[:, None, :]
    assert torch.equal(article_mask(ids), same.tril()[:, None])
    starts, ends = article_spans(ids)
    assert torch.equal(starts.long(), same.byte().argmax(-1))
    assert torch.equal(ends, starts + same.sum(-1))
    assert starts.dtype == ends.dtype == torch.int32


def test_an_id_that_comes_back_is_another_article() -> None:
    mask = article_mask(torch.tensor([[1, 2, 2, 1]]))
    assert mask[0, 0].tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [False, True, True, False],
        [False, False, False, True],
    ]


def test_a_row_of_one_token() -> None:
    assert article_spans(torch.tensor([[7]])).tolist() == [[[0]], [[1]]]
