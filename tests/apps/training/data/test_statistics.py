"""Unigram statistics against the definition, written with Counter."""

import math
from collections import Counter

import numpy as np
import pytest

from apps.training.data.packing import Rows
from apps.training.data.statistics import UnigramCounts


def test_entropies_follow_the_definition_and_padding_does_not_count():
    train = Rows(np.array([[0, 1, 1, 9], [2, 1, 0, 0]], np.int32), np.array([[0, 1, 1, 2], [1, 1, 3, 1]], np.int32))
    dev = Rows(np.array([[1, 3, 9, 9]], np.int32), np.array([[1, 3, 2, 2]], np.int32))
    counts = UnigramCounts(10)
    counts.add_train(train)
    counts.add_dev(dev)
    seen = Counter([0, 1, 1, 2, 1, 0, 0])
    assert counts.entropy() == pytest.approx(-sum(n / 7 * math.log(n / 7) for n in seen.values()))
    assert counts.dev_cross_entropy() == pytest.approx(-(math.log(4 / 17) + math.log(1 / 17)) / 2)


def test_without_dev_tokens_there_is_no_figure():
    counts = UnigramCounts(3)
    counts.add_train(Rows(np.array([[0, 1]]), np.array([[1, 1]])))
    assert counts.as_metadata()["dev_unigram_cross_entropy_nats"] is None
