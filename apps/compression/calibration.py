"""The data of a compression: train rows to take moments over, and the dev split to judge it on."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from apps.compression.settings import CompressSettings
from apps.parity.forward import logits_of, loss_of
from apps.training.data.loader import TrainLoader, dev_batches
from apps.training.data.prepare import default_dataset
from apps.training.data.storage import Dataset, open_dataset
from apps.training.loss import make_batch, microbatches
from apps.training.progress import Progress
from apps.training.workers.group import Workers
from backends.errors import UserError
from backends.precision import as_torch, at_least_float32


def require_positions(settings: CompressSettings, config: Any) -> None:
    """UserError when rows are longer than the model was made for: moments behind its last position mean nothing."""
    positions = config.max_position_embeddings
    if settings.max_seq_length > positions and config.rope_parameters["rope_type"] != "dynamic":
        raise UserError(
            f"Rows of {settings.max_seq_length} tokens are longer than the {positions} positions of this model "
            f"(max_position_embeddings). Use max_seq_length={positions} or less."
        )


def find_data(settings: CompressSettings, vocab_size: int, workers: Workers) -> Dataset:
    """The dataset that the settings name, or the embedded corpus' (made by the first worker). Raises UserError."""
    folder = settings.compress.calibration
    if folder is None:
        if workers.is_first:
            folder = str(default_dataset(settings.max_seq_length, vocab_size))
        folder = workers.broadcast_text(folder or "")
    return open_dataset(
        Path(folder),
        max_seq_length=settings.max_seq_length,
        vocab_size=vocab_size,
        batch_size=settings.batch_size * workers.world_size,
        evaluate=settings.evaluate,
        length_setting="max_seq_length",
    )


def calibration_batches(
    dataset: Dataset, settings: CompressSettings, workers: Workers, device: torch.device
) -> list[dict[str, Any]]:
    """This worker's share of the first batches that hold `compress.tokens`, as the model is called with them.

    Each row is taken once: a dataset with fewer tokens gives those it has.
    """
    loader = TrainLoader(
        dataset,
        batch_size=settings.batch_size,
        seed=settings.seed,
        rank=workers.rank,
        world_size=workers.world_size,
    )
    per_batch = settings.batch_size * settings.max_seq_length * workers.world_size
    wanted = max(1, math.ceil(settings.compress.tokens / per_batch))
    rows = islice(iter(loader), min(wanted, loader.batches_per_epoch))
    batches = (make_batch(each, article_attention=False).input_ids for each in rows)
    return [{"input_ids": ids.to(device), "use_cache": False} for ids in batches]


@torch.no_grad()
def perplexity(
    model: Any, dataset: Dataset, settings: CompressSettings, workers: Workers, device: torch.device, label: str
) -> float:
    """exp of the mean loss over the counted positions of the dev split, all of it by this worker."""
    total, counted = 0.0, 0
    dtype = as_torch(at_least_float32(model.precision.logits))
    num_batches = -(-dataset.num_dev_rows // settings.batch_size)
    with Progress(num_batches, label, "batches", mode=settings.progress) as progress:
        for rows in dev_batches(dataset, settings.batch_size):
            batch = make_batch(rows, article_attention=False)
            (tensors,) = microbatches([batch], device=device, dtype=dtype)
            total += float(loss_of(logits_of(model, tensors), tensors)) * batch.num_counted
            counted += batch.num_counted
            workers.doing(f"taking the perplexity, batch {progress.done + 1} of {num_batches}")
            progress.update()
    loss = total / max(counted, 1)
    return math.exp(loss) if loss < 700 else math.inf
