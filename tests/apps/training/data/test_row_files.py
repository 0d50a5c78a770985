"""Random access to rows: right, within its memory budget, and safe from wrong ids."""

import threading

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.training.data.row_files import RowFiles, inspect
from backends.errors import UserError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of 5, 0 and 8 rows of two tokens, in chunks of 3 rows (cut across the row in the last one)."""
    folder = tmp_path_factory.mktemp("rows")
    made, first = [], 0
    for number, (rows, chunks) in enumerate([(5, (3, 2)), (0, (3, 2)), (8, (3, 1))]):
        path = folder / f"train_{number}_of_3.hdf5"
        with h5py.File(path, "w") as file:
            for name, value in (("input_ids", np.arange(first, first + rows)), ("token_type_ids", np.arange(rows) % 4)):
                data = np.stack([value, value], axis=1).astype(np.int32)
                file.create_dataset(name, data=data, chunks=chunks, maxshape=(None, 2), compression="gzip")
        made.append(inspect(path, 2))
        first += rows
    return made


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(numbers=st.lists(st.integers(0, 12), max_size=20), cache=st.sampled_from([0, 40, 10**6]))
def test_any_rows_in_any_order_with_any_cache(files, numbers, cache):
    rows = RowFiles(files, 2, vocab_size=13, cache_bytes=cache).read(np.array(numbers, dtype=np.int64))
    assert rows.input_ids.tolist() == [[number, number] for number in numbers]
    assert rows.token_type_ids.tolist() == [[(n if n < 5 else n - 5) % 4] * 2 for n in numbers]
    assert (rows.input_ids.dtype, rows.token_type_ids.dtype) == (np.int32, np.int32)


def test_blocks_in_memory_stay_within_the_budget(files):
    block = 3 * 2 * (4 + 1)  # rows × tokens × (int32 + int8)
    rows = RowFiles(files, 2, vocab_size=13, cache_bytes=2 * block)
    rows.read(np.arange(13))
    held = sum(part.nbytes for found in rows._blocks.values() for part in found)
    assert 0 < held <= 2 * block


def test_an_id_outside_the_vocabulary_is_named(files):
    with pytest.raises(UserError, match=r"train_2_of_3.hdf5' holds token id 12 near row 6: expected 0 to 11"):
        RowFiles(files, 2, vocab_size=12).read(np.array([12]))


def test_a_file_that_vanishes_while_training_is_named(files, tmp_path):
    gone = RowFiles([files[0].__class__(tmp_path / "train_1_of_1.hdf5", 5, 3)], 2, None)
    with pytest.raises(UserError, match=r"Cannot read rows from 3 of .*train_1_of_1.hdf5"):
        gone.read(np.array([4]))


def test_threads_share_the_files(files):
    rows, wrong = RowFiles(files, 2, vocab_size=13, cache_bytes=40), []

    def read_many(seed):
        for numbers in np.random.default_rng(seed).integers(0, 13, (50, 4)):
            if (rows.read(numbers).input_ids[:, 0] != numbers).any():
                wrong.append(numbers)

    threads = [threading.Thread(target=read_many, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
