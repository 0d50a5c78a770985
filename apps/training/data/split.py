"""Which articles go into train, dev and test. By article, never by row, so that no held-out text is also trained on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from apps.training.data.order import shuffled
from backends.errors import UserError

_SPLIT, _ORDER = 0x5B117, 0x04DE4  # keep the two uses of one seed apart


class Stretches(NamedTuple):
    """Stretches of the spooled tokens: where each starts, how many tokens it has. int64 [n] both."""

    starts: np.ndarray
    lengths: np.ndarray


class Split(NamedTuple):
    """Article numbers, int64, sorted. `cut`: no article is small enough to be held out; each one's tail is."""

    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray
    cut: bool


def split_articles(sizes: np.ndarray, dev_ratio: float, test_ratio: float, seed: int) -> Split:
    """Draw the held-out articles, up to these shares of the text. sizes: bytes of each article, int64 [n].

    Raises UserError when the ratios leave nothing for training, or not even one article fits in test_ratio.
    """
    if dev_ratio + test_ratio >= 1:
        raise UserError(f"dev_ratio={dev_ratio} and test_ratio={test_ratio} leave nothing to train on. Lower them.")
    drawn = shuffled(np.arange(len(sizes)), len(sizes), seed, _SPLIT)
    test = _draw(drawn, sizes, test_ratio * sizes.sum())
    if test_ratio and not len(test):
        raise UserError(
            f"test_ratio={test_ratio} of {sizes.sum():,} bytes is less than any of the {len(sizes)} articles. "
            f"Give more articles or a larger ratio."
        )
    rest = drawn[~np.isin(drawn, test)]
    dev = _draw(rest, sizes, dev_ratio * sizes.sum())
    train = rest[~np.isin(rest, dev)]
    return Split(np.sort(train), dev, test, cut=dev_ratio > 0 and not len(dev))


def _draw(drawn: np.ndarray, sizes: np.ndarray, room: float) -> np.ndarray:
    """Those of `drawn`, in order, that fit in `room` bytes; sorted. Gives up after a hundred that do not fit."""
    held: list[int] = []
    misses = 0
    for number, size in zip(drawn.tolist(), sizes[drawn].tolist(), strict=True):
        if size <= room:
            held.append(number)
            room -= size
            misses = 0
        elif (misses := misses + 1) == 100:
            break
    return np.sort(np.array(held, np.int64))


def cut_tails(articles: Stretches, share: float) -> tuple[Stretches, Stretches]:
    """Each article's beginning, and its last `share` where that is a token at least and leaves two before it."""
    tails = np.minimum((articles.lengths * share).astype(np.int64), articles.lengths - 2).clip(min=0)
    heads = articles.lengths - tails
    has_tail = tails > 0
    return Stretches(articles.starts, heads), Stretches((articles.starts + heads)[has_tail], tails[has_tail])


def in_shuffled_order(stretches: Stretches, seed: int) -> Stretches:
    order = shuffled(np.arange(len(stretches.starts)), len(stretches.starts), seed, _ORDER)
    return Stretches(stretches.starts[order], stretches.lengths[order])
