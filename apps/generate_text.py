"""Continue a text with a trained model, token by token from a key-value cache.

    python apps/generate_text.py checkpoint.model_name_or_path=outputs/runs/default prompt="def main(" max_new_tokens=40

The continuation goes to stdout, progress and speed to stderr. Works on every folder that this project writes and on any
Hugging Face Llama folder with a tokenizer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __package__ in (None, ""):  # started as a file, from whatever folder: apps/ itself must not be on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.training.cli import run_main
from apps.training.config import parse_dataclass
from apps.training.config_schema import setting
from apps.training.progress import Progress
from backends.errors import UserError

SMALLEST_TEMPERATURE = 1e-5  # below it logits are as far apart as float32 tells, or infinite: the likeliest token


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    model_name_or_path: str = setting(help="folder with config.json, weights and tokenizer")


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Continue a text with a trained model."""

    checkpoint: CheckpointSettings
    prompt: str = setting(help="the text to continue; may be empty", allow_empty=True)
    max_new_tokens: int = setting(64, "stop after this many tokens, or at the end of the text", at_least=1)
    temperature: float | None = setting(
        None, "0: always the likeliest token; null: 0, or 1 with top_k/top_p", at_least=0
    )
    top_k: int | None = setting(None, "draw from the k likeliest tokens", at_least=1)
    top_p: float | None = setting(None, "draw from the likeliest tokens of this total probability", above=0, at_most=1)
    seed: int = setting(42, "seed of the drawing", at_least=0, at_most=2**64 - 1)
    tokenizer: str | None = setting(None, "folder with the tokenizer; null: the model's")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is a GPU")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting("auto", "auto: the dtype of the stored weights")


def generate(argv: Sequence[str]) -> None:
    """Read the settings, load model and tokenizer, print the continuation."""
    settings = parse_dataclass(GenerateSettings, argv, program="generate_text.py")
    tokenizer, model = load(settings)
    started = time.monotonic()
    text, count = continue_text(model, tokenizer, settings)
    print(text)
    seconds = time.monotonic() - started
    print(f"{count} tokens in {seconds:.1f} s ({count / seconds:.0f} tokens/s)", file=sys.stderr)


def load(settings: GenerateSettings) -> tuple[Any, Any]:
    """The tokenizer and the model on its device. Raises UserError for whatever is wrong with the folder."""
    from apps.training.devices import choose_device
    from modelzoo import load_config, load_model

    folder = settings.checkpoint.model_name_or_path
    config = load_config(model_name_or_path=folder)  # the quickest check comes first
    tokenizer = load_tokenizer(settings.tokenizer or folder)
    dtype = None if settings.dtype == "auto" else settings.dtype
    with Progress(None, "Loading", "bytes") as progress:
        model = load_model(folder, config, device=choose_device(settings.device), dtype=dtype, progress=progress.show)
    return tokenizer, model


def load_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer in `folder`."""
    import transformers

    transformers.logging.set_verbosity_error()  # its advice is about settings that are not the user's
    try:
        return transformers.AutoTokenizer.from_pretrained(Path(folder).expanduser(), local_files_only=True)
    except Exception as error:  # a missing or damaged file gives an error of many kinds and lines
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"Cannot load a tokenizer from '{folder}': {reason}. Name a folder that has one with tokenizer=FOLDER."
        ) from error


def continue_text(model: Any, tokenizer: Any, settings: GenerateSettings) -> tuple[str, int]:
    """(the text that follows the prompt, its number of tokens)."""
    import torch
    from transformers import GenerationConfig

    prompt = prompt_tokens(model, tokenizer, settings)
    input_ids = torch.tensor([prompt], device=model.device)
    torch.manual_seed(settings.seed)
    # The folder's own says more (penalties, beams), which would change what the settings promise.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    with Progress(settings.max_new_tokens, "Generating", "tokens") as progress:
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            streamer=TokenCounter(progress),
            **sampling(settings),
            use_cache=True,  # a training config may have it off
            # On a GPU keys and values of fixed size, so that a token's kernels are launched as one.
            cache_implementation="static" if model.device.type == "cuda" else None,
            max_new_tokens=settings.max_new_tokens,
        )[0].tolist()
    # Tokens are pieces of words and bytes: only together with the prompt do they decode to the right spaces.
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(output, skip_special_tokens=True)[len(before) :], len(output) - len(prompt)


def prompt_tokens(model: Any, tokenizer: Any, settings: GenerateSettings) -> list[int]:
    """The prompt's tokens; an empty prompt is the start of a text. Raises UserError when the model cannot take them."""
    tokens: list[int] = tokenizer(settings.prompt)["input_ids"]
    if not tokens:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise UserError("The prompt is empty and the tokenizer has no token that starts a text. Give a prompt.")
        tokens = [start]
    vocabulary, positions = model.config.vocab_size, model.config.max_position_embeddings
    if max(tokens) >= vocabulary:
        raise UserError(
            f"The tokenizer gives token {max(tokens)}, the model knows {vocabulary} (0 to {vocabulary - 1}). "
            "Use the tokenizer that the model was trained with: tokenizer=FOLDER."
        )
    total = len(tokens) + settings.max_new_tokens
    if total > positions and model.config.rope_parameters["rope_type"] != "dynamic":
        raise UserError(
            f"The prompt's {len(tokens)} tokens and max_new_tokens={settings.max_new_tokens} are {total} together; the "
            f"model has {positions} positions. Use a shorter prompt or fewer new tokens."
        )
    return tokens


def sampling(settings: GenerateSettings) -> dict[str, Any]:
    """The arguments of generate() for greedy or drawn tokens; limits not asked for are switched off."""
    limited = settings.top_k is not None or settings.top_p is not None
    temperature = settings.temperature if settings.temperature is not None else float(limited)
    if temperature < SMALLEST_TEMPERATURE:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    return {"do_sample": True, "temperature": temperature, "top_k": settings.top_k or 0, "top_p": settings.top_p or 1.0}


def end_tokens(model: Any, tokenizer: Any) -> list[int] | None:
    """Tokens that end a text: the tokenizer's, and those of the model that are special to the tokenizer too."""
    listed = model.generation_config.eos_token_id
    ends = set(listed if isinstance(listed, list) else [listed])
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return sorted({*(ends & special), tokenizer.eos_token_id} - {None}) or None


class TokenCounter:
    """A `streamer` for generate(): counts tokens instead of printing them."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seen_prompt = False

    def put(self, tokens: Any) -> None:
        """Called with the prompt first, then with each token."""
        if self.seen_prompt:
            self.progress.update(1)
        self.seen_prompt = True

    def end(self) -> None:
        """Called after the last token."""


def main() -> int:
    """Entry point: exit code 2 and one line for a user's mistake."""
    return run_main(generate)


if __name__ == "__main__":
    sys.exit(main())
