"""A dataset folder in the layout of generative_data_prep: what lies in it, and opening one.

    train_1_of_N.hdf5 …  dev_1_of_M.hdf5 …   input_ids and token_type_ids, int32 [rows, S], gzip
    test_files/*.jsonl                       held-out articles as text
    tokenizer/                               a Hugging Face tokenizer
    metadata.yaml                            what it was made with, and counts
    sha256/files_metadata.json               a sha256 for each file

Ours and theirs read alike: unknown HDF5 datasets (category_ids) and unknown metadata keys are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.training.data.row_files import AGAIN, RowFiles, inspect
from backends.errors import UserError, did_you_mean

METADATA = "metadata.yaml"


@dataclass(frozen=True)
class Dataset:
    """An opened and checked dataset. Rows are read on demand; `dev` is None when there is no dev split."""

    folder: Path
    metadata: Mapping[str, Any]
    train: RowFiles
    dev: RowFiles | None

    @property
    def max_seq_length(self) -> int:
        return self.train.max_seq_length

    @property
    def num_train_rows(self) -> int:
        return self.train.num_rows

    @property
    def num_dev_rows(self) -> int:
        return 0 if self.dev is None else self.dev.num_rows

    @property
    def tokenizer_folder(self) -> Path | None:
        folder = self.folder / "tokenizer"
        return folder if folder.is_dir() else None

    @property
    def unigram_entropy(self) -> float | None:
        """Nats per token of the train split's token frequencies; only our own datasets record it."""
        return self.metadata.get("unigram_entropy_nats")

    @property
    def dev_unigram_cross_entropy(self) -> float | None:
        """Nats per token of the dev split under the train split's token frequencies: the loss of a model that knows
        how often each token comes, and nothing else."""
        return self.metadata.get("dev_unigram_cross_entropy_nats")


def open_dataset(
    folder: str | Path,
    *,
    max_seq_length: int,
    vocab_size: int | None = None,
    batch_size: int = 1,
    evaluate: bool = False,
    length_setting: str = "model.max_seq_length",
) -> Dataset:
    """Open the dataset in `folder` for a model, reading headers only.

    vocab_size: the model's. batch_size: the rows of one optimizer step, over all microbatches and workers.
    evaluate: whether dev rows are needed. length_setting: what the program calls the length. Raises UserError when
    something is missing, damaged or does not fit.
    """
    folder = Path(folder)
    train_files = _find(folder, "train")
    metadata = _read_metadata(folder)
    length, dataset_vocab = metadata["max_seq_length"], metadata.get("vocab_size")
    if length != max_seq_length:
        raise UserError(
            f"This dataset (seq len {length}) is not compatible with this model (seq len {max_seq_length}). "
            f"Set {length_setting}={length}, or prepare '{folder}' again with max_seq_length={max_seq_length}."
        )
    if vocab_size is not None and dataset_vocab is not None and dataset_vocab > vocab_size:
        raise UserError(
            f"This dataset (vocabulary {dataset_vocab}) is not compatible with this model (vocabulary {vocab_size}). "
            f"Use a model with a larger vocabulary, or prepare '{folder}' again with the model's tokenizer."
        )
    limit = vocab_size if vocab_size is not None else dataset_vocab
    train = RowFiles([inspect(path, length) for path in train_files], length, limit)
    dev_files = _find(folder, "dev", required=False)
    dev = RowFiles([inspect(path, length) for path in dev_files], length, limit) if dev_files else None
    _require_counted(folder, metadata, train=train, dev=dev)
    if train.num_rows < batch_size:
        raise UserError(
            f"One step takes {batch_size} rows but the dataset '{folder}' has {train.num_rows}. "
            f"Use a smaller batch (or fewer accumulation steps or workers), or more data."
        )
    if evaluate and (dev is None or dev.num_rows == 0):
        raise UserError(
            f"The dataset '{folder}' has no dev rows to evaluate on. "
            f"Set training.evaluate=false, or prepare it again with dev_ratio=0.05."
        )
    return Dataset(folder, metadata, train, dev)


def file_index(path: Path) -> tuple[int, str]:
    """Sort key of train_3_of_8.hdf5: the number after the first underscore, as the reference reader has it."""
    number = path.stem.split("_")[1] if "_" in path.stem else ""
    return (int(number) if number.isdigit() else 0, path.name)


def _find(folder: Path, split: str, required: bool = True) -> list[Path]:
    """The HDF5 files of a split, in order."""
    make = f"Make one with: python apps/prepare_data.py output_dir={folder}"
    if folder.is_file():
        make = f"Make one from it: python apps/prepare_data.py input={folder} output_dir=outputs/datasets/{folder.stem}"
        raise UserError(f"'{folder}' is a file, expected a dataset folder. {make}")
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"There is no dataset folder '{folder}'.{did_you_mean(folder.name, near)} {make}")
    names = (path for path in folder.glob(f"*{split}*") if path.suffix in (".hdf5", ".h5"))
    files = sorted((path for path in names if not path.name.startswith(".")), key=file_index)
    if required and not files:
        raise UserError(f"'{folder}' holds no {split}_*_of_*.hdf5 files: not a dataset folder. {make}")
    _require_all(folder, split, {path.stem for path in files})
    return files


def _require_all(folder: Path, split: str, names: set[str]) -> None:
    """A file that was lost on the way (train_3_of_8 is not there) would be training on less than was prepared."""
    counts = {int(match[1]) for name in names if (match := re.fullmatch(rf"{split}_\d+_of_(\d+)", name))}
    if len(counts) > 1:
        several = " and ".join(f"{split}_*_of_{count}" for count in sorted(counts))
        raise UserError(
            f"'{folder}' holds the {split} files of several datasets: {several}. Copy each into a folder of its own."
        )
    missing = [
        name for i in range(1, max(counts, default=0) + 1) if (name := f"{split}_{i}_of_{max(counts)}") not in names
    ]
    if missing:
        raise UserError(
            f"'{folder}' lacks {len(missing)} of its {max(counts)} {split} files: {', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}. Copy it again, or prepare it again with apps/prepare_data.py."
        )


def _require_counted(folder: Path, metadata: Mapping[str, Any], **splits: RowFiles | None) -> None:
    """Files of another dataset may have taken the place of its own. Only of our own datasets are the counts known."""
    for split, files in splits.items():
        expected = metadata.get(f"{split}_sequences") if "input_sha256" in metadata else None
        if files is not None and expected is not None and files.num_rows != expected:
            raise UserError(
                f"'{folder}' has {files.num_rows} {split} rows, its {METADATA} says {expected}: files of several "
                f"datasets lie there. Copy it again into an empty folder. {AGAIN}"
            )


def _read_metadata(folder: Path) -> Mapping[str, Any]:
    import yaml

    path = folder / METADATA
    try:
        metadata = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"'{folder}' has no {METADATA}: not a whole dataset folder. {AGAIN}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not YAML. {AGAIN}") from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get("max_seq_length"), int):
        raise UserError(f"'{path}' does not say max_seq_length. {AGAIN}")
    if not isinstance(metadata.get("vocab_size"), int | None):
        raise UserError(f"'{path}' has vocab_size {metadata['vocab_size']!r}: expected a number. {AGAIN}")
    return metadata
