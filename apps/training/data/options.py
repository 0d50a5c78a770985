"""Every setting of preparing a dataset (`python apps/prepare_data.py --help` prints them)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apps.training.config_schema import setting
from apps.training.data.packing import Overflow, Packing

DATASETS_FOLDER = Path("outputs/datasets")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Make a dataset folder for apps/train_llm.py: find text, split, tokenize, pack, write. With no setting at all it
    makes one from the Python standard library's own sources, which lie on every machine."""

    input: str = setting("corpus", "file, folder, pattern, Hugging Face dataset, or 'corpus': Python's own sources")
    input_split: str = setting("train", "which split of a Hugging Face dataset")
    input_subset: str | None = setting(None, "which configuration of a Hugging Face dataset")
    skip_undecodable: bool = setting(False, "leave out text files that are not UTF-8, and say how many")
    text_keyword: str = setting("text", "key of raw text in a record")
    prompt_keyword: str = setting("prompt", "key of a pair's prompt; the loss counts its tokens too")
    completion_keyword: str = setting("completion", "key of a pair's completion")
    space_separator: bool = setting(True, "put exactly one space between prompt and completion")
    chat_template: Literal["auto", "all", "plain"] = setting(
        "auto",
        "auto: the tokenizer's for conversations, if it has one; all: for pairs too; plain: 'User: … Assistant: …'",
    )
    output_dir: str | None = setting(None, f"where the dataset goes; null: a folder of its own in {DATASETS_FOLDER}")
    overwrite: bool = setting(False, "replace what lies in output_dir once the new dataset is complete")
    tokenizer: str = setting("train", "tokenizer folder or name; 'train' trains one on the input")
    vocab_size: int = setting(4096, "size of a trained tokenizer's vocabulary", at_least=2)
    max_seq_length: int = setting(256, "tokens in a row", at_least=2)
    packing: Packing = setting("full", "full: articles split over rows; greedy: whole articles; single: one a row")
    overflow: Overflow = setting("drop", "what greedy and single do with an article longer than a row")
    shuffle: bool = setting(True, "shuffle the articles before packing; rows are reshuffled each epoch anyway")
    seed: int = setting(42, "seed of the split and the shuffle", at_least=0, at_most=2**64 - 1)
    dev_ratio: float = setting(
        0.05, "share of the text held out for evaluation, in whole articles", at_least=0, below=1
    )
    test_ratio: float = setting(0.0, "share of the text put aside as it is, into test_files/", at_least=0, below=1)
    num_splits: int = setting(8, "training files; rows are spread evenly over them", at_least=1)
    num_dev_splits: int = setting(1, "dev files", at_least=1)
    workers: int | None = setting(None, "threads that tokenize; null: one a core", at_least=1)

    @property
    def folder(self) -> Path:
        """Where the dataset goes."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        vocabulary = f"vocab{self.vocab_size}" if self.tokenizer == "train" else Path(self.tokenizer).name
        return DATASETS_FOLDER / f"{Path(self.input).stem}-{vocabulary}-seq{self.max_seq_length}"
