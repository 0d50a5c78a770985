"""Which articles are held out: a share of the text, drawn by the seed, none of it also in train."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.data.split import Stretches, cut_tails, split_articles
from backends.errors import UserError


@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=200),
    dev_ratio=st.floats(0, 0.5),
    seed=st.integers(0, 1000),
)
def test_every_article_is_in_one_split_and_no_more_than_its_share_is_held_out(sizes, dev_ratio, seed):
    sizes = np.array(sizes)
    split = split_articles(sizes, dev_ratio, 0.0, seed)
    assert sorted([*split.train, *split.dev, *split.test]) == list(range(len(sizes)))
    assert sizes[split.dev].sum() <= dev_ratio * sizes.sum()
    assert split.cut == (dev_ratio > 0 and not len(split.dev))
    assert len(split.train)


def test_shares_are_met_when_there_are_many_articles():
    sizes = np.random.default_rng(0).integers(1, 1000, 2000)
    split = split_articles(sizes, 0.1, 0.2, seed=1)
    assert sizes[split.dev].sum() / sizes.sum() == pytest.approx(0.1, abs=0.001)
    assert sizes[split.test].sum() / sizes.sum() == pytest.approx(0.2, abs=0.001)


def test_the_seed_draws():
    def drawn(seed):
        return split_articles(np.full(100, 7), 0.1, 0.0, seed).dev.tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(1)) == 10


def test_tails_are_held_out_where_whole_articles_cannot_be():
    assert split_articles(np.array([1000]), 0.1, 0.0, 0).cut
    heads, tails = cut_tails(Stretches(np.array([0, 100, 103]), np.array([100, 3, 50])), 0.1)
    assert heads.starts.tolist() == [0, 100, 103]
    assert heads.lengths.tolist() == [90, 3, 45]
    assert tails.starts.tolist() == [90, 148]
    assert tails.lengths.tolist() == [10, 5]


def test_impossible_ratios_are_refused():
    with pytest.raises(UserError, match="leave nothing to train on"):
        split_articles(np.ones(10), 0.5, 0.5, 0)
    with pytest.raises(UserError, match="less than any of the 3 articles"):
        split_articles(np.full(3, 10), 0.0, 0.1, 0)
