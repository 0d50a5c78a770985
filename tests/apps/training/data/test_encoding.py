"""Tokens and types of articles, the same for any number of threads."""

import os

import numpy as np
import pytest

from apps.training.data import encoding
from apps.training.data.articles import Piece, Segment, Style, article, text_segments
from apps.training.data.encoding import encode
from apps.training.data.token_types import TokenType
from apps.training.data.tokenizer import Tokenizer, train_tokenizer

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(["some words to merge, some more words"], 280, tmp_path_factory.mktemp("tokenizer"))


def ids(tokenizer, text):
    return tokenizer.backend.encode(text).ids


def test_raw_text_is_completion_and_ends_in_a_separator(tokenizer):
    [piece] = encode([Piece(text_segments("some words"))], tokenizer, 1)
    assert piece.ids.tolist() == [*ids(tokenizer, "some words"), EOS]
    assert piece.types.tolist() == [1] * (len(piece.ids) - 1) + [TokenType.SEPARATOR]
    assert (piece.ids.dtype, piece.types.dtype, piece.num_bytes, piece.last) == (np.int32, np.int8, 10, True)


def test_every_pair_ends_in_eos_and_only_the_last_is_the_separator(tokenizer):
    pairs = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    [piece] = encode([Piece(article(pairs, Style()))], tokenizer, 1)
    expected = [("a", 0), (" b", 1), (None, 1), ("c", 0), (" d", 1), (None, 3)]
    flat = [(token, kind) for text, kind in expected for token in ([EOS] if text is None else ids(tokenizer, text))]
    assert piece.ids.tolist() == [token for token, _ in flat]
    assert piece.types.tolist() == [kind for _, kind in flat]


def test_an_article_in_parts_is_separated_once(tokenizer):
    parts = [Piece(text_segments("some ", end=False), last=False), Piece(text_segments("words"), first=False)]
    first, second = encode(parts, tokenizer, 1)
    assert (first.last, second.last) == (False, True)
    assert TokenType.SEPARATOR not in first.types
    assert (second.ids[-1], second.types[-1]) == (EOS, TokenType.SEPARATOR)


def test_a_template_that_closes_with_eos_gets_no_second_one(tokenizer):
    segments = (Segment("hi", TokenType.PROMPT, False), Segment("yes<|endoftext|>", TokenType.COMPLETION, False))
    [closed] = encode([Piece(segments)], tokenizer, 1)
    assert closed.ids.tolist() == [*ids(tokenizer, "hi"), *ids(tokenizer, "yes"), EOS]
    assert closed.types[-1] == TokenType.SEPARATOR


def test_bos_starts_an_article_once_where_the_tokenizer_wants_it(tokenizer):
    wants_bos = Tokenizer(tokenizer.backend, eos_id=EOS, pad_id=1, bos_id=1, vocab_size=280)
    pieces = [Piece(text_segments("a", end=False), last=False), Piece(text_segments("b"), first=False)]
    pieces.append(Piece(text_segments("<|pad|>c")))  # written by a chat template
    assert [piece.ids[:1].tolist() == [1] for piece in encode(pieces, wants_bos, 1)] == [True, False, True]
    assert [piece.ids.tolist().count(1) for piece in encode(pieces, wants_bos, 1)] == [1, 0, 1]


def test_any_number_of_threads_gives_the_same(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_GROUP_CHARACTERS", 50)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    pieces = [Piece(text_segments(f"some words number {n} " * (n % 5 + 1))) for n in range(200)]

    def run(workers):
        return [(piece.ids.tolist(), piece.types.tolist()) for piece in encode(iter(pieces), tokenizer, workers)]

    assert run(1) == run(2) == run(7)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_only_a_few_groups_are_read_ahead(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_GROUP_CHARACTERS", 1)
    read = []
    pieces = (read.append(n) or Piece(text_segments("words")) for n in range(1000))
    encoded = encode(pieces, tokenizer, 2)
    next(encoded)
    assert len(read) <= 6
    encoded.close()
