"""The dataset a run trains on: the one its settings name, or the embedded corpus'."""

from __future__ import annotations

from apps.training.config_schema import TrainConfig
from apps.training.data.prepare import default_dataset
from apps.training.data.storage import Dataset, open_dataset
from apps.training.workers.group import Workers


def find_dataset(config: TrainConfig, vocab_size: int, rows_per_step: int, workers: Workers) -> Dataset:
    """Open it on every worker; one that is missing and can be made is made by the first. Raises UserError."""
    settings, length = config.training, config.model.max_seq_length
    if settings.dataset is None and workers.is_first:
        workers.doing("preparing the embedded corpus")
        default_dataset(length, vocab_size)
    workers.waiting("waiting for the dataset")
    workers.barrier()
    workers.doing("opening the dataset")
    return open_dataset(
        settings.dataset or default_dataset(length, vocab_size),
        max_seq_length=length,
        vocab_size=vocab_size,
        batch_size=rows_per_step,
        evaluate=settings.evaluate or settings.eval_steps is not None,
    )
