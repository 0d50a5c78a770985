"""Make a dataset folder from text.

    python apps/prepare_data.py                                     the embedded corpus, into outputs/datasets/
    python apps/prepare_data.py input=texts/ output_dir=D vocab_size=8192 max_seq_length=512
    python apps/prepare_data.py input=chats.jsonl output_dir=D tokenizer=DIR packing=greedy overflow=truncate_right
    python apps/prepare_data.py --help

The folder is complete or not there: an error or Ctrl-C leaves nothing behind. apps/training/data/prepare.py tells how.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.training.cli import run_main
from apps.training.config import parse_dataclass
from apps.training.data.options import PrepareOptions

COUNTS = (  # a line of the table, and its key in metadata.yaml after train_ and dev_
    ("rows", "sequences"),
    ("articles", "articles"),
    ("tokens", "input_tokens"),
    ("  of prompts", "prompt_tokens"),
    ("  of completions", "completion_tokens"),
    ("  dropped, too long", "tokens_dropped_from_packing"),
    ("  dropped, prompt only", "tokens_dropped_from_all_prompt"),
    ("padding", "padding_tokens"),
)


def program(argv: Sequence[str]) -> None:
    """Make the dataset and print what came out."""
    options = parse_dataclass(PrepareOptions, argv, program="prepare_data.py")

    from apps.training.data.prepare import prepare

    prepared = prepare(options)
    print(summary(prepared.metadata))
    print(f"Dataset saved at {prepared.folder}/")


def summary(metadata: Mapping[str, Any]) -> str:
    """A table of what is in the dataset."""
    lines = [
        ("", "train", "dev"),
        *((name, *_both(metadata, key)) for name, key in COUNTS),
        ("files", metadata["number_of_training_files"], metadata["number_of_dev_files"]),
    ]
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    table = [f"  {name:<{widths[0]}}  {train:>{widths[1]}}  {dev:>{widths[2]}}" for name, train, dev in cells]
    dev_cost = metadata["dev_unigram_cross_entropy_nats"]
    facts = [
        ("input", f"{metadata['input']}: {metadata['input_articles']:,} articles, {metadata['input_bytes']:,} bytes"),
        ("input sha256", metadata["input_sha256"]),
        ("packing", f"{metadata['packing']} {metadata['overflow'] or ''}".rstrip()),
        ("tokens in a row", f"{metadata['max_seq_length']:,}"),
        ("vocabulary", f"{metadata['vocab_size']:,}"),
        ("bytes per token", f"{metadata['bytes_per_token']:.3f}"),
        ("unigram entropy", f"{metadata['unigram_entropy_nats']:.4f} nats a token"),
        ("dev under unigrams", "no dev split" if dev_cost is None else f"{dev_cost:.4f} nats a token"),
    ]
    if left_out := metadata.get("number_of_files_left_out"):
        facts.insert(1, ("left out", f"{left_out:,} file{'s' * (left_out > 1)} not in UTF-8"))
    return "\n".join([*table, "", *(f"  {name:<19} {value}" for name, value in facts)])


def _both(metadata: Mapping[str, Any], key: str) -> tuple[int, int]:
    return metadata[f"train_{key}"], metadata[f"dev_{key}"]


def main() -> int:
    return run_main(program)


if __name__ == "__main__":
    sys.exit(main())
