"""The dataset folder: read by their reader's conventions, theirs read by us, and anything broken named in one line."""

import h5py
import numpy as np
import pytest
import yaml

from apps.training.data.storage import open_dataset
from apps.training.data.writing import write_metadata
from backends.errors import UserError


def test_headers_are_checked_and_rows_counted(make_dataset):
    dataset = open_dataset(
        make_dataset(train=20, dev=5), max_seq_length=4, vocab_size=2000, batch_size=20, evaluate=True
    )
    assert (dataset.num_train_rows, dataset.num_dev_rows, dataset.max_seq_length) == (20, 5, 4)
    assert dataset.tokenizer_folder is None
    assert dataset.unigram_entropy is None


def test_a_folder_written_by_hand_in_their_layout_is_read(tmp_path):
    """h5py's automatic chunks, category_ids beside the two datasets, a metadata.yaml with their keys, 10 after 9."""
    for number in range(1, 12):
        with h5py.File(tmp_path / f"train_{number}_of_11.hdf5", "w") as file:
            for name in ("input_ids", "token_type_ids", "category_ids"):
                data = [[number, number]] * 3 if name == "input_ids" else [[0, 1]] * 3
                file.create_dataset(name, data=data, dtype="i4", compression="gzip", maxshape=(None, 2))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "test_files").mkdir()
    (tmp_path / "metadata.yaml").write_text(
        "max_batch_size_dev: null\nmax_batch_size_train: 3\nmax_seq_length: 2\nnumber_of_dev_files: 0\n"
        "number_of_test_files: 0\nnumber_of_training_files: 11\ntoken_type_ids: true\nvocab_size: 12\n"
        "tokenizer_model_type: <class 'transformers.models.gpt2.configuration_gpt2.GPT2Config'>\n"
    )
    dataset = open_dataset(tmp_path, max_seq_length=2, vocab_size=12)
    rows = dataset.train.read(np.arange(33))
    assert rows.input_ids[:, 0].tolist() == [number for number in range(1, 12) for _ in range(3)]
    assert rows.token_type_ids.tolist() == [[0, 1]] * 33
    assert dataset.dev is None
    assert dataset.tokenizer_folder == tmp_path / "tokenizer"


def test_a_missing_folder_is_named_with_the_nearest_one_and_the_command(make_dataset):
    folder = make_dataset()
    with pytest.raises(
        UserError, match=rf"There is no dataset folder .* Did you mean '{folder.name}'\? .*prepare_data.py"
    ):
        open_dataset(folder.parent / (folder.name + "s"), max_seq_length=4)


@pytest.mark.parametrize(("split", "number"), [("train", 2), ("dev", 1)])
def test_a_file_lost_on_the_way_is_missed(tmp_path, split, number):
    """Training goes on without it otherwise, on less than was prepared, and nobody would know."""
    for name in ("train_1_of_3", "train_2_of_3", "train_3_of_3", "dev_1_of_2", "dev_2_of_2"):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["input_ids"] = file["token_type_ids"] = np.zeros((3, 4), np.int32)
    (tmp_path / "metadata.yaml").write_text("max_seq_length: 4\nvocab_size: 12\n")
    assert open_dataset(tmp_path, max_seq_length=4).num_train_rows == 9
    next(tmp_path.glob(f"{split}_{number}_*")).unlink()
    with pytest.raises(UserError, match=rf"lacks 1 of its \d {split} files: {split}_{number}_of_\d\. Copy"):
        open_dataset(tmp_path, max_seq_length=4)


def test_an_empty_folder_and_a_file_are_not_datasets(tmp_path):
    with pytest.raises(UserError, match="holds no train_.* files: not a dataset folder"):
        open_dataset(tmp_path, max_seq_length=4)
    (tmp_path / "text.jsonl").write_text("{}")
    with pytest.raises(UserError, match="is a file, expected a dataset folder.*input=.*text.jsonl"):
        open_dataset(tmp_path / "text.jsonl", max_seq_length=4)


def test_sequence_length_vocabulary_and_batch_must_fit(make_dataset):
    folder = make_dataset(train=20, vocab_size=2000)
    with pytest.raises(UserError, match=r"This dataset \(seq len 4\) is not compatible with this model \(seq len 8\)"):
        open_dataset(folder, max_seq_length=8)
    with pytest.raises(UserError, match=r"vocabulary 2000.*vocabulary 1999"):
        open_dataset(folder, max_seq_length=4, vocab_size=1999)
    with pytest.raises(UserError, match="One step takes 21 rows but the dataset .* has 20"):
        open_dataset(folder, max_seq_length=4, batch_size=21)


def test_evaluating_needs_dev_rows(make_dataset):
    folder = make_dataset(dev=0)
    assert open_dataset(folder, max_seq_length=4).num_dev_rows == 0
    with pytest.raises(UserError, match=r"no dev rows.*training.evaluate=false.*dev_ratio"):
        open_dataset(folder, max_seq_length=4, evaluate=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def text_instead(path):
    path.write_text("not HDF5")


def without_types(path):
    with h5py.File(path, "a") as file:
        del file["token_type_ids"]


def floats(path):
    with h5py.File(path, "w") as file:
        file["input_ids"] = file["token_type_ids"] = np.zeros((3, 4))


def other_length(path):
    with h5py.File(path, "w") as file:
        file["input_ids"] = file["token_type_ids"] = np.zeros((3, 5), np.int32)


def fewer_types(path):
    with h5py.File(path, "w") as file:
        file["input_ids"], file["token_type_ids"] = np.zeros((3, 4), np.int32), np.zeros((2, 4), np.int32)


def test_two_datasets_copied_into_one_folder_are_not_read_as_one(make_dataset):
    """Names of other counts lie side by side; names of the same count replace each other, and the rows differ."""
    old, new = make_dataset(files=2), make_dataset(files=4)
    for path in new.glob("train*"):
        path.rename(old / path.name)
    with pytest.raises(
        UserError, match=r"train files of several datasets: train_\*_of_2 and train_\*_of_4\. Copy each"
    ):
        open_dataset(old, max_seq_length=4)


@pytest.mark.parametrize(("split", "found"), [("train", 20), ("dev", 5)])
def test_rows_that_the_metadata_does_not_count_are_refused(make_dataset, split, found):
    folder = make_dataset(train=20, dev=5)
    counts = {"train_sequences": 20, "dev_sequences": 5}
    known = {"max_seq_length": 4, "vocab_size": 2000, "input_sha256": "ab"}
    write_metadata(folder, known | counts)
    assert open_dataset(folder, max_seq_length=4).num_train_rows == 20
    write_metadata(folder, known | counts | {f"{split}_sequences": 97})
    with pytest.raises(UserError, match=rf"has {found} {split} rows, its metadata\.yaml says 97"):
        open_dataset(folder, max_seq_length=4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is not a whole HDF5 file .*truncated"),
        (text_instead, "is not a whole HDF5 file .*signature not found"),
        (without_types, "has no dataset 'token_type_ids': expected input_ids and token_type_ids"),
        (floats, r"is float64 \[3, 4\]: expected int32 \[rows, 4\]"),
        (other_length, "has rows of 5 tokens, its metadata.yaml says 4"),
        (fewer_types, "differ in shape"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(make_dataset, damage, message):
    folder = make_dataset()
    damage(folder / "train_2_of_3.hdf5")
    with pytest.raises(UserError, match=f"train_2_of_3.hdf5.*{message}|{message}.*train_2_of_3.hdf5") as caught:
        open_dataset(folder, max_seq_length=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no metadata.yaml"),
        ("a: [", "is not YAML"),
        ("vocab_size: 3", "does not say max_seq_length"),
        (yaml.safe_dump({"max_seq_length": 4, "vocab_size": "many"}), "vocab_size 'many': expected a number"),
    ],
)
def test_broken_metadata_is_named(make_dataset, text, message):
    folder = make_dataset()
    (folder / "metadata.yaml").unlink()
    if text is not None:
        (folder / "metadata.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        open_dataset(folder, max_seq_length=4)
