"""What we write, read by an independent re-implementation of the reference reader's conventions."""

import json
import os
import resource
from contextlib import contextmanager
from itertools import pairwise

import h5py
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.training.data.packing import Rows
from apps.training.data.row_files import RowFiles, inspect
from apps.training.data.writing import SplitWriter, sha256_of_file, write_checksums, write_metadata
from backends.errors import UserError


def read_like_the_reference(folder):
    """Every key of every `*train*` file, files in the order of the number in their name."""
    columns = {}
    for path in sorted(folder.glob("*train*"), key=lambda path: int(path.stem.split("_")[1])):
        with h5py.File(path) as file:
            assert len({len(data) for data in file.values()}) == 1
            for key, data in file.items():
                columns.setdefault(key, []).append(np.asarray(data).astype(np.int32))
    return {key: np.concatenate(parts) for key, parts in columns.items()}


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40),
    length=st.sampled_from([1, 3, 2048, 5000]),
    files=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 40), max_size=3),
    seed=st.integers(0, 99),
)
def test_rows_come_back_from_both_readers_and_files_are_balanced(tmp_path_factory, count, length, files, cuts, seed):
    folder = tmp_path_factory.mktemp("written")
    rng = np.random.default_rng(seed)
    rows = Rows(
        rng.integers(0, 2**31 - 1, (count, length), dtype=np.int32), rng.integers(0, 4, (count, length), dtype=np.int32)
    )
    writer = SplitWriter(folder, "train", files, length)
    for first, last in pairwise([0, *sorted(min(cut, count) for cut in cuts), count]):
        writer.write(Rows(rows.input_ids[first:last], rows.token_type_ids[first:last]))
    paths = writer.close()

    used = min(files, count)
    assert [path.name for path in paths] == [f"train_{number + 1}_of_{used}.hdf5" for number in range(used)]
    assert sorted(folder.iterdir()) == sorted(paths)
    order = np.concatenate([np.arange(number, count, files) for number in range(used)])
    theirs = read_like_the_reference(folder)
    assert theirs.keys() == {"input_ids", "token_type_ids"}
    np.testing.assert_array_equal(theirs["input_ids"], rows.input_ids[order])
    np.testing.assert_array_equal(theirs["token_type_ids"], rows.token_type_ids[order])
    inspected = [inspect(path, length) for path in paths]
    ours = RowFiles(inspected, length, None).read(np.arange(count))
    np.testing.assert_array_equal(ours.input_ids, rows.input_ids[order])
    np.testing.assert_array_equal(ours.token_type_ids, rows.token_type_ids[order])
    sizes = [file.num_rows for file in inspected]
    assert max(sizes) - min(sizes) <= 1


def test_files_have_the_types_the_layout_asks_for(tmp_path):
    with SplitWriter(tmp_path, "dev", 1, 8) as writer:
        writer.write(Rows(np.zeros((3, 8), np.int32), np.ones((3, 8), np.int32)))
    with h5py.File(tmp_path / "dev_1_of_1.hdf5") as file:
        assert sorted(file) == ["input_ids", "token_type_ids"]
        for data in file.values():
            assert (data.dtype, data.shape, data.maxshape, data.compression) == (np.int32, (3, 8), (None, 8), "gzip")


def test_equal_rows_give_equal_bytes_however_they_are_portioned(tmp_path):
    rows = Rows(np.arange(8000, dtype=np.int32).reshape(-1, 4), np.ones((2000, 4), np.int32))
    digests = []
    for name, step in (("a", 2000), ("b", 7)):
        (tmp_path / name).mkdir()
        with SplitWriter(tmp_path / name, "train", 2, 4) as writer:
            for first in range(0, 2000, step):
                writer.write(Rows(*(part[first : first + step] for part in rows)))
        digests.append([sha256_of_file(path) for path in sorted((tmp_path / name).iterdir())])
    assert digests[0] == digests[1]


def test_nothing_written_leaves_no_files(tmp_path):
    assert SplitWriter(tmp_path, "dev", 3, 4).close() == []
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_writing_stays_the_error_and_names_no_file(tmp_path):
    writer = SplitWriter(tmp_path, "train", 2, 4)
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert list(tmp_path.glob("train*")) == []


@contextmanager
def limited(what, most):
    """At most so many bytes a file (then errno 27), or open files of this process."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


def random_rows(count):
    rng = np.random.default_rng(0)
    return Rows(rng.integers(0, 30_000, (count, 64), np.int32), np.zeros((count, 64), np.int32))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_disk_that_is_full_is_the_systems_error_with_the_file(tmp_path, share, capfd):
    """Whether it is full for the header, the rows, or what HDF5 writes when a file is closed."""
    with SplitWriter(tmp_path, "dev", 1, 64) as writer:
        writer.write(random_rows(256))
    room = int(share * (tmp_path / "dev_1_of_1.hdf5").stat().st_size)
    with (
        limited(resource.RLIMIT_FSIZE, room),
        pytest.raises(OSError, match=r"File too large: .*\.train-0'$"),
        SplitWriter(tmp_path, "train", 1, 64) as writer,
    ):
        writer.write(random_rows(256))
    assert "Exception ignored" not in capfd.readouterr().err


def test_more_files_than_may_be_open_are_answered_with_the_setting(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with (
        limited(resource.RLIMIT_NOFILE, before + 20),
        pytest.raises(UserError, match=r"num_dev_splits=64 files cannot all be open at once: .*'ulimit -n 164'"),
    ):
        SplitWriter(tmp_path, "dev", 64, 4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_metadata_and_checksums(tmp_path):
    write_metadata(tmp_path, {"vocab_size": 3, "max_seq_length": 4})
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    write_checksums(tmp_path)
    assert yaml.safe_load((tmp_path / "metadata.yaml").read_text()) == {"vocab_size": 3, "max_seq_length": 4}
    known = json.loads((tmp_path / "sha256" / "files_metadata.json").read_text())
    assert known.keys() == {"metadata.yaml", "tokenizer/tokenizer.json"}
    assert known["tokenizer/tokenizer.json"] == {
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
        "modified_time": 0.0,
    }
