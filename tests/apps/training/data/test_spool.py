"""Tokens wait on disk and come back in any order."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.training.data.encoding import EncodedPiece
from apps.training.data.spool import Spool


@settings(max_examples=30, deadline=None)
@given(articles=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6), data=st.data())
def test_articles_come_back_in_any_order(tmp_path_factory, articles, data):
    """articles: the sizes of each one's pieces."""
    tokens, pieces = iter(range(10**6)), []
    for sizes in articles:
        for index, size in enumerate(sizes):
            ids = np.array([next(tokens) for _ in range(size)], np.int32)
            pieces.append(EncodedPiece(ids, (ids % 4).astype(np.int8), index == len(sizes) - 1, 10 * size))
    with Spool(tmp_path_factory.mktemp("spool") / "new") as spool:
        for piece in pieces:
            spool.append(piece)
        spool.finish()
    assert spool.lengths.tolist() == [sum(sizes) for sizes in articles]
    assert spool.num_bytes.tolist() == [10 * sum(sizes) for sizes in articles]
    wanted = np.array(data.draw(st.permutations(range(len(articles)))))
    taken = spool.take(spool.starts[wanted], spool.lengths[wanted])
    expected = [t for n in wanted for t in range(spool.starts[n], spool.starts[n] + spool.lengths[n])]
    assert taken.ids.tolist() == expected
    assert taken.types.tolist() == [token % 4 for token in expected]
    assert taken.lengths.tolist() == spool.lengths[wanted].tolist()
