"""Tokenizers: train a byte-level BPE on a dataset's own text, or use one that exists. Both are Hugging Face folders.

A trained one follows GPT-2 (Radford et al., 2019, section 2.2): byte-level BPE, so that any text comes back exactly,
and one token `<|endoftext|>` that both ends a text and stands for the start of one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.training.data.articles import Messages
from apps.training.data.hub import asking_the_hub
from backends.errors import UserError

EOS, PAD = "<|endoftext|>", "<|pad|>"
SMALLEST_VOCAB = 256 + 2  # every byte, and the two special tokens
_LLAMA_CONFIG = "<class 'transformers.models.llama.configuration_llama.LlamaConfig'>"


@dataclass(frozen=True)
class Tokenizer:
    """What preparing a dataset needs of a tokenizer.

    bos_id is None unless the tokenizer itself starts every text with it. vocab_size: one more than the largest id.
    """

    backend: Any  # tokenizers.Tokenizer
    eos_id: int
    pad_id: int
    bos_id: int | None
    vocab_size: int
    model_type: str = _LLAMA_CONFIG  # as generative_data_prep writes it into metadata.yaml
    chat: Any = None  # the transformers tokenizer, if it has a chat template

    def as_metadata(self) -> dict[str, Any]:
        """The part of metadata.yaml about the tokenizer."""
        return {
            "vocab_size": self.vocab_size,
            "tokenizer_model_type": self.model_type,
            "eos_token_id": self.eos_id,
            "pad_token_id": self.pad_id,
        }

    def render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """Write a conversation by the chat template. Raises ValueError when the template refuses it."""
        from jinja2 import TemplateError

        try:
            return self.chat.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation ({error})") from error


def check_vocab_size(vocab_size: int) -> None:
    """Raise UserError when a trained vocabulary of this size could not hold every byte."""
    if vocab_size < SMALLEST_VOCAB:
        raise UserError(f"vocab_size={vocab_size} is too small: expected {SMALLEST_VOCAB} (bytes, EOS, pad) or more.")


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Tokenizer:
    """Train a BPE on `texts` and save it into `folder`, for AutoTokenizer to load.

    Too little text gives a smaller vocabulary than asked for. The same texts give the same tokenizer.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    check_vocab_size(vocab_size)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(EOS, special=True), AddedToken(PAD, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": EOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,  # what transformers writes for "no limit"
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return Tokenizer(backend, eos_id=0, pad_id=1, bos_id=None, vocab_size=backend.get_vocab_size())


def load_tokenizer(name: str) -> Tokenizer:
    """Load the tokenizer in folder `name` (or of that name on the hub) with AutoTokenizer. Raises UserError."""
    from transformers import AutoTokenizer

    try:
        with nullcontext() if Path(name).exists() else asking_the_hub(name):
            loaded = AutoTokenizer.from_pretrained(name)
        backend = loaded.backend_tokenizer
    except Exception as error:  # missing files, foreign formats, no network: each has an error class of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Cannot load a tokenizer from '{name}' ({reason}). Expected a Hugging Face tokenizer, or tokenizer=train."
        ) from error
    if loaded.eos_token_id is None:
        raise UserError(f"The tokenizer '{name}' has no EOS token, which ends an article. Set eos_token in its config.")
    backend.no_padding()
    backend.no_truncation()
    starts_with_bos = loaded.bos_token_id is not None and backend.encode("").ids[:1] == [loaded.bos_token_id]
    return Tokenizer(
        backend,
        eos_id=loaded.eos_token_id,
        pad_id=loaded.eos_token_id if loaded.pad_token_id is None else loaded.pad_token_id,
        bos_id=loaded.bos_token_id if starts_with_bos else None,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        model_type=_model_type(Path(name)),
        chat=loaded if loaded.chat_template else None,
    )


def copy_tokenizer(name: str, folder: Path) -> None:
    """Save the tokenizer `name` into `folder`, with the model's config.json when that lies beside it."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(name).save_pretrained(folder)
    config = Path(name) / "config.json"
    if config.is_file():
        shutil.copyfile(config, folder / "config.json")


def _model_type(folder: Path) -> str:
    """The config class of the model in `folder`, the way the reference validator compares it."""
    from transformers import CONFIG_MAPPING

    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        return str(CONFIG_MAPPING[kind])
    except (OSError, ValueError, KeyError):
        return _LLAMA_CONFIG
