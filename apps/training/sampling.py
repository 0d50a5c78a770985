"""A continuation by the trained model, for people to look at in the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.training.data.row_files import RowFiles
from apps.training.data.token_types import TokenType

PROMPT_TOKENS = 24
NEW_TOKENS = 120


def sample_text(
    model: Any, tokenizer_folder: Path, *, prompt: str | None, rows: RowFiles, seed: int
) -> tuple[str, str] | None:
    """(prompt, continuation) sampled at temperature 0.8 from the 50 likeliest tokens; the same for the same seed.

    Without a `prompt` the beginning of the first of `rows` is continued. None when there is nothing to start from.
    """
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    positions = model.config.max_position_embeddings
    new_tokens = max(min(NEW_TOKENS, positions // 2), 1)  # a short context is not left
    room = positions - new_tokens
    ids = _beginning(rows) if prompt is None else tokenizer(prompt, return_tensors="pt")["input_ids"]
    ids = ids[:, -max(room, 1) :].long()
    if ids.shape[1] == 0:
        return None
    device = next(model.parameters()).device
    was_training, own = model.training, model.generation_config
    model.eval()
    # A folder that training began with may ask for beams or penalties, which are not what the report says.
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=tokenizer.eos_token_id)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            output = model.generate(
                ids.to(device),
                attention_mask=torch.ones_like(ids, device=device),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=0.8,
                top_k=50,
            )
    finally:
        model.train(was_training)
        model.generation_config = own
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(ids[0], skip_special_tokens=True), tokenizer.decode(new, skip_special_tokens=True)


def _beginning(rows: RowFiles) -> Tensor:
    """int32 [1, at most PROMPT_TOKENS]: the first row's first tokens, up to its first padding."""
    first = rows.read(torch.zeros(1, dtype=torch.int64).numpy())
    types = first.token_type_ids[0, :PROMPT_TOKENS]
    length = int((types != TokenType.PADDING).cumprod().sum())
    return torch.from_numpy(first.input_ids[:, :length])
