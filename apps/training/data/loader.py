"""Batches for training, reshuffled every epoch, and batches for evaluation.

Which rows a worker gets is plain arithmetic on (seed, epoch, batch number), so any worker finds its own without a word
to the others, and a run resumes anywhere. Step s of an epoch takes the s-th stretch of G rows of the epoch's shuffled
order, G = batch size × workers × accumulation steps; the rows of a step, and of all steps together, are therefore the
same for any number of workers that divides G. The rows left at the end of an epoch (fewer than G) are not used in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np

from apps.training.data.order import shuffled
from apps.training.data.packing import Rows
from apps.training.data.prefetch import prefetched
from apps.training.data.storage import Dataset
from apps.training.data.token_types import TokenType
from backends.errors import UserError


class TrainLoader:
    """This worker's training batches, epoch after epoch without end. Memory is bounded; a thread reads ahead.

    batch_size: rows of one microbatch of one worker. start_batch: microbatches of this worker to skip, counted over all
    epochs; skipping costs nothing. Each `iter()` starts there. Raises UserError when one step needs more rows than
    the dataset has.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        gradient_accumulation_steps: int = 1,
        start_batch: int = 0,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size, self.start_batch = rank, world_size, start_batch
        self.accumulation = gradient_accumulation_steps
        self.rows_per_step = batch_size * world_size * gradient_accumulation_steps
        if dataset.num_train_rows < self.rows_per_step:
            raise UserError(
                f"One step takes {self.rows_per_step} rows ({batch_size} a batch × {world_size} workers × "
                f"{gradient_accumulation_steps} accumulation steps) but the dataset '{dataset.folder}' has "
                f"{dataset.num_train_rows}. Use a smaller batch or more data."
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.dataset.num_train_rows // self.rows_per_step

    @property
    def batches_per_epoch(self) -> int:
        """Microbatches of this worker in an epoch."""
        return self.steps_per_epoch * self.accumulation

    @property
    def unused_rows(self) -> int:
        """Rows left over at the end of an epoch; others each time, as the order changes."""
        return self.dataset.num_train_rows % self.rows_per_step

    def description(self) -> str:
        """The dataset in a line, for the screen."""
        left_over = f"({self.unused_rows} left over in each epoch, others every time)"
        rows = f"{self.dataset.num_train_rows:,} train rows {left_over}, {self.dataset.num_dev_rows:,} dev rows"
        return f"{self.dataset.folder}, {rows}"

    def row_numbers(self, batch: int) -> np.ndarray:
        """The dataset rows of this worker's batch number `batch`, int64 [batch_size]."""
        step, micro = divmod(batch, self.accumulation)
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        first = step_of_epoch * self.rows_per_step + (micro * self.world_size + self.rank) * self.batch_size
        return shuffled(first + np.arange(self.batch_size), self.dataset.num_train_rows, self.seed, epoch)

    def check(self) -> None:
        """Read the first batch, so that what is wrong with the rows is a UserError before a run writes anything."""
        self.dataset.train.read(self.row_numbers(self.start_batch))

    def __iter__(self) -> Iterator[Rows]:
        read = self.dataset.train.read
        return prefetched(read(self.row_numbers(batch)) for batch in count(self.start_batch))


def dev_batches(dataset: Dataset, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Rows]:
    """Yield this worker's share of the dev rows, each row exactly once over all workers.

    Every worker yields the same number of batches of the same shape, int32 [batch_size, S]: where rows run out, rows of
    nothing but padding follow, which count nowhere. Raises UserError when there are no dev rows.
    """
    dev = dataset.dev
    if dev is None or dev.num_rows == 0:
        raise UserError(
            f"The dataset '{dataset.folder}' has no dev rows to evaluate on. "
            f"Set training.evaluate=false, or prepare it again with dev_ratio=0.05."
        )
    stride = batch_size * world_size
    firsts = range(rank * batch_size, rank * batch_size + -(-dev.num_rows // stride) * stride, stride)

    def padded(first: int) -> Rows:
        rows = dev.read(np.arange(min(first, dev.num_rows), min(first + batch_size, dev.num_rows)))
        missing = batch_size - len(rows.input_ids)
        return Rows(
            np.pad(rows.input_ids, ((0, missing), (0, 0))),
            np.pad(rows.token_type_ids, ((0, missing), (0, 0)), constant_values=TokenType.PADDING),
        )

    return prefetched(padded(first) for first in firsts)
