"""Stretches of spooled tokens become rows a bounded number at a time."""

import numpy as np
import pytest

from apps.training.data import assemble
from apps.training.data.encoding import EncodedPiece
from apps.training.data.packing import Packer
from apps.training.data.split import Stretches
from apps.training.data.spool import Spool


class CountingSpool(Spool):
    """Notes how many tokens are taken at once."""

    most = 0

    def take(self, starts, lengths):
        self.most = max(self.most, int(lengths.sum()))
        return super().take(starts, lengths)


@pytest.fixture
def spool(tmp_path):
    """Articles of 3, 100 and 7 tokens, numbered through."""
    first = 0
    with CountingSpool(tmp_path / "spool") as spool:
        for size in (3, 100, 7):
            ids = np.arange(first, first + size, dtype=np.int32)
            spool.append(EncodedPiece(ids, np.ones(size, np.int8), True, size))
            first += size
        spool.finish()
    return spool


@pytest.mark.parametrize(
    ("packing", "overflow", "expected"),
    [
        ("full", "drop", list(range(110))),
        ("greedy", "drop", [0, 1, 2]),
        ("greedy", "truncate_left", [0, 1, 2, *range(98, 103), *range(105, 110)]),
        ("single", "truncate_right", [0, 1, 2, *range(3, 8), *range(103, 108)]),
    ],
)
def test_however_long_an_article_only_a_bounded_part_is_in_memory(spool, monkeypatch, packing, overflow, expected):
    monkeypatch.setattr(assemble, "_TOKENS_AT_ONCE", 8)
    packer = Packer(5, 0, packing)
    rows = list(assemble._pack(spool, Stretches(spool.starts, spool.lengths), packer, overflow))
    tokens = np.concatenate([part.input_ids[part.token_type_ids != 2] for part in rows])
    assert tokens.tolist() == expected
    assert spool.most <= 2 * 8
    assert packer.counts.input_tokens == 110
    assert packer.counts.tokens_dropped_from_packing == 110 - len(tokens)
