"""Small datasets for the tests of this room."""

from pathlib import Path

import numpy as np
import pytest

from apps.training.data.packing import Rows
from apps.training.data.storage import open_dataset
from apps.training.data.writing import SplitWriter, write_metadata


def numbered_rows(count, length, first=0):
    """Rows that tell which they are: row i is filled with the id first + i, all of it completion."""
    ids = np.repeat(np.arange(first, first + count, dtype=np.int32)[:, None], length, axis=1)
    return Rows(ids, np.ones_like(ids))


@pytest.fixture
def make_dataset(tmp_path):
    """Write a dataset of numbered rows and return its folder; dev rows are numbered from 1000."""

    def make(train=20, dev=5, length=4, files=3, vocab_size=2000) -> Path:
        folder = tmp_path / f"dataset-{train}-{dev}-{length}-{files}"
        folder.mkdir()
        for split, count, first in (("train", train, 0), ("dev", dev, 1000)):
            if count:
                with SplitWriter(folder, split, files, length) as writer:
                    writer.write(numbered_rows(count, length, first))
        write_metadata(folder, {"max_seq_length": length, "vocab_size": vocab_size})
        return folder

    return make


@pytest.fixture
def make_opened(make_dataset):
    """Write a dataset of numbered rows and open it."""

    def make(length=4, **options):
        return open_dataset(make_dataset(length=length, **options), max_seq_length=length)

    return make
