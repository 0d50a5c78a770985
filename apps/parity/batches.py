"""The batches that every variant is measured on: the same ones, in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice

import torch
from torch import Tensor

from apps.parity.settings import CompareSettings
from apps.training.data.loader import TrainLoader, dev_batches
from apps.training.data.packing import Rows
from apps.training.data.prepare import default_dataset
from apps.training.data.storage import Dataset, open_dataset
from apps.training.loss import make_batch, microbatches
from backends.errors import UserError
from backends.precision import as_torch, at_least_float32

Tensors = Mapping[str, Tensor]


def find_dataset(settings: CompareSettings, vocab_size: int) -> Dataset:
    """The dataset that the settings name, or the embedded corpus' (made when missing). Raises UserError."""
    length = settings.model.max_seq_length
    folder = settings.dataset or default_dataset(length, vocab_size)
    dataset = open_dataset(
        folder, max_seq_length=length, vocab_size=vocab_size, batch_size=settings.batch_size, evaluate=False
    )
    if dataset.num_dev_rows == 0:
        raise UserError(
            f"The dataset '{folder}' has no dev rows to take logits and perplexity on. Prepare it again with "
            "dev_ratio=0.05."
        )
    return dataset


class Batches:
    """Batches of one dataset on the device, as a train step takes them."""

    def __init__(self, dataset: Dataset, settings: CompareSettings, device: torch.device) -> None:
        self.dataset, self.settings, self.device = dataset, settings, device
        self.loader = TrainLoader(dataset, batch_size=settings.batch_size, seed=settings.seed)

    def calibration(self) -> list[Tensors]:
        """The first train batches: what backends with statistics see before anything is measured."""
        return self._train(0, self.settings.calibrate_batches)

    def measured(self) -> list[Tensors]:
        """The train batches after those of the calibration: what layers' errors are taken over."""
        return self._train(self.settings.calibrate_batches, self.settings.num_batches)

    def dev(self) -> Iterator[tuple[Tensors, int]]:
        """(batch, its counted positions) through the dev split, or through its first `eval_batches`."""
        for rows in islice(dev_batches(self.dataset, self.settings.batch_size), self.num_dev):
            yield self._tensors(rows)

    def description(self) -> str:
        """What is measured on, in a line."""
        settings = self.settings
        length, part = settings.model.max_seq_length, "" if settings.eval_batches is None else "the first "
        rows = min(self.num_dev * settings.batch_size, self.dataset.num_dev_rows)
        return (
            f"{self.dataset.folder}, batches of {settings.batch_size} × {length} tokens: {settings.num_batches} for "
            f"the layers after {settings.calibrate_batches} to calibrate; {part}{rows:,} dev rows"
        )

    @property
    def num_dev(self) -> int:
        """How many batches `dev` yields."""
        all_of_them = -(-self.dataset.num_dev_rows // self.settings.batch_size)
        return min(all_of_them, self.settings.eval_batches or all_of_them)

    def _train(self, first: int, count: int) -> list[Tensors]:
        read, rows_of = self.dataset.train.read, self.loader.row_numbers
        return [self._tensors(read(rows_of(number)))[0] for number in range(first, first + count)]

    def _tensors(self, rows: Rows) -> tuple[Tensors, int]:
        batch = make_batch(rows, article_attention=self.settings.model.article_attention)
        dtype = as_torch(at_least_float32(self.settings.precision.logits))
        (tensors,) = microbatches([batch], device=self.device, dtype=dtype)
        return tensors, batch.num_counted
