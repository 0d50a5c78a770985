"""Which rows come when: every row once an epoch, the same for any worker count, from any starting point."""

from itertools import chain, islice

import numpy as np
import pytest

from apps.training.data.loader import TrainLoader, dev_batches
from backends.errors import UserError


def ids(batches):
    """The row numbers in each batch."""
    return [rows.input_ids[:, 0].tolist() for rows in batches]


def test_an_epoch_has_each_row_at_most_once_in_an_order_of_its_own(make_opened):
    loader = TrainLoader(make_opened(train=20), batch_size=3, seed=1)
    assert (loader.batches_per_epoch, loader.steps_per_epoch, loader.unused_rows) == (6, 6, 2)
    batches = ids(islice(loader, 12))
    first, second = list(chain(*batches[:6])), list(chain(*batches[6:]))
    assert len(set(first)) == len(set(second)) == 18
    assert first != second
    assert first != sorted(first)


def test_the_seed_names_the_order(make_opened):
    dataset = make_opened()

    def order(seed):
        return ids(islice(TrainLoader(dataset, batch_size=4, seed=seed), 5))

    assert order(1) == order(1)
    assert order(1) != order(2)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 13, 1000])
def test_a_run_resumes_at_any_batch(make_opened, start):
    dataset = make_opened()
    whole = TrainLoader(dataset, batch_size=3, seed=1)
    expected = [whole.row_numbers(batch).tolist() for batch in range(start, start + 8)]
    resumed = TrainLoader(dataset, batch_size=3, seed=1, start_batch=start)
    assert [np.sort(batch).tolist() for batch in expected] == [sorted(batch) for batch in number(resumed, dataset, 8)]
    if start < 20:
        assert ids(islice(whole, start, start + 8)) == ids(islice(resumed, 8))


def number(loader, dataset, batches):
    """The dataset rows whose content came."""
    of_content = {value: row for row, value in enumerate(dataset.train.read(np.arange(20)).input_ids[:, 0].tolist())}
    return [[of_content[value] for value in batch] for batch in ids(islice(loader, batches))]


@pytest.mark.parametrize(
    ("world_size", "batch_size", "accumulation"), [(1, 8, 1), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 2, 4)]
)
def test_a_step_takes_the_same_rows_for_any_worker_count(make_opened, world_size, batch_size, accumulation):
    """20 rows, 8 a step: 4 are unused each epoch, whoever shares the work."""
    dataset = make_opened(train=20)
    alone = ids(islice(TrainLoader(dataset, batch_size=8, seed=3), 6))
    workers = [
        TrainLoader(
            dataset,
            batch_size=batch_size,
            seed=3,
            rank=rank,
            world_size=world_size,
            gradient_accumulation_steps=accumulation,
        )
        for rank in range(world_size)
    ]
    assert {worker.steps_per_epoch for worker in workers} == {2}
    assert {worker.batches_per_epoch for worker in workers} == {2 * accumulation}
    streams = [iter(worker) for worker in workers]
    for step in alone:
        together = [ids([next(stream)])[0] for _ in range(accumulation) for stream in streams]
        assert list(chain(*together)) == step


def test_a_step_larger_than_the_dataset_is_refused(make_opened):
    with pytest.raises(
        UserError, match=r"One step takes 24 rows \(6 a batch × 2 workers × 2 accumulation steps\).*has 20"
    ):
        TrainLoader(make_opened(train=20), batch_size=6, seed=0, world_size=2, gradient_accumulation_steps=2)


def test_an_error_while_reading_reaches_the_trainer(make_opened):
    dataset = make_opened()
    loader = iter(TrainLoader(dataset, batch_size=4, seed=0))
    for file in dataset.train.files:
        file.path.unlink()
    with pytest.raises(UserError, match="Cannot read rows"):
        next(loader)


def test_a_check_meets_the_error_before_the_trainer_does(make_opened):
    dataset = make_opened()
    for file in dataset.train.files:
        file.path.unlink()
    with pytest.raises(UserError, match="Cannot read rows"):
        TrainLoader(dataset, batch_size=4, seed=0).check()


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 5), (1, 2), (2, 2), (4, 3)])
def test_every_dev_row_counts_once_over_all_workers(make_opened, world_size, batch_size):
    dataset = make_opened(dev=5)
    shares = [list(dev_batches(dataset, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in zip(*batch, strict=True)]
    assert all(batch.input_ids.shape == (batch_size, 4) for share in shares for batch in share)
    counted = sorted(int(row[0]) for row, types in rows if (types != 2).any())
    assert counted == [1000, 1001, 1002, 1003, 1004]
    assert all((types == 2).all() and (row == 0).all() for row, types in rows if row[0] < 1000)


def test_evaluating_without_dev_rows_is_refused(make_opened):
    with pytest.raises(UserError, match="no dev rows"):
        dev_batches(make_opened(dev=0), 2)
