"""How often each token comes, and what a model that knows only this would score."""

from __future__ import annotations

import numpy as np

from apps.training.data.packing import Rows
from apps.training.data.token_types import TokenType


class UnigramCounts:
    """Counts tokens (padding left out) of both splits, a few rows at a time."""

    def __init__(self, vocab_size: int) -> None:
        self.train, self.dev = (np.zeros(vocab_size, np.int64) for _ in range(2))

    def add_train(self, rows: Rows) -> None:
        self.train += self._counts(rows)

    def add_dev(self, rows: Rows) -> None:
        self.dev += self._counts(rows)

    def entropy(self) -> float:
        """Nats per token of the train split's frequencies p: −Σ p ln p."""
        p = self.train[self.train > 0] / self.train.sum()
        return float(-(p * np.log(p)).sum())

    def dev_cross_entropy(self) -> float | None:
        """Nats per token of the dev split under the train split's frequencies; None without dev tokens.

        Each token counts once more than it was seen (Laplace), so that one which never came has a finite cost.
        """
        if not self.dev.sum():
            return None
        costs = np.log(self.train.sum() + len(self.train)) - np.log(self.train + 1)
        return float((self.dev * costs).sum() / self.dev.sum())

    def as_metadata(self) -> dict[str, float | None]:
        return {"unigram_entropy_nats": self.entropy(), "dev_unigram_cross_entropy_nats": self.dev_cross_entropy()}

    def _counts(self, rows: Rows) -> np.ndarray:
        return np.bincount(rows.input_ids[rows.token_type_ids != TokenType.PADDING], minlength=len(self.train))
