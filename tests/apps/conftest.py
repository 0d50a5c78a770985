"""A model and a dataset small enough to train on in a second."""

from collections.abc import Iterator
from pathlib import Path

import pytest

VOCABULARY, LENGTH = 300, 32
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards box with five jugs of ink"


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 100 train rows and 20 dev rows of 32 tokens, with padding and article separators, vocabulary 300."""
    from apps.training.data.options import PrepareOptions
    from apps.training.data.prepare import prepare

    folder = tmp_path_factory.mktemp("tiny")
    words = WORDS.split()
    articles = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(8 + i % 19)) for i in range(240)]
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in articles))
    return prepare(
        PrepareOptions(
            input=str(folder / "text.jsonl"),
            output_dir=str(folder / "dataset"),
            vocab_size=VOCABULARY,
            max_seq_length=LENGTH,
            packing="greedy",
            dev_ratio=0.15,
            num_splits=2,
            workers=1,
        )
    ).folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config.json of a Llama of 2 layers."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def equal_regions_made_once() -> Iterator[None]:
    """For a test that compiles in this process and is about something else."""
    from tests import region_cache

    with region_cache.equal_regions_made_once():
        yield


@pytest.fixture
def settings(tiny_dataset: Path, tiny_model: Path, tmp_path: Path) -> dict[str, str]:
    """A run of four steps with the eager twin into tmp_path/out, as settings to change."""
    return {
        "command": "run",
        "compile.target": "eager",
        "compile.arch": "cpu",
        "checkpoint.config_name": str(tiny_model),
        "model.max_seq_length": str(LENGTH),
        "training.dataset": str(tiny_dataset),
        "training.batch_size": "4",
        "training.max_steps": "4",
        "training.output_dir": str(tmp_path / "out"),
    }
