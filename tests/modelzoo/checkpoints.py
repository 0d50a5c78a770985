"""Checkpoint folders in every layout that Hugging Face models come in, for the tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

LAYOUTS = ("single safetensors", "sharded safetensors", "single bin", "sharded bin", "bin of old torch")


def write_checkpoint(
    model: PreTrainedModel, folder: Path, layout: str = "single safetensors", weights: dict[str, Tensor] | None = None
) -> Path:
    """Write `model` (or `weights` in place of its own) and its config to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    weights = dict(model.state_dict()) if weights is None else weights
    binary = "bin" in layout
    if not binary and model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    split = split_torch_state_dict_into_shards(
        weights,
        filename_pattern="pytorch_model{suffix}.bin" if binary else "model{suffix}.safetensors",
        max_shard_size=20_000 if "sharded" in layout else 10**9,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name] for name in names}
        if binary:
            torch.save(shard, folder / file, _use_new_zipfile_serialization="old" not in layout)
        else:
            save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        name = "pytorch_model.bin.index.json" if binary else "model.safetensors.index.json"
        (folder / name).write_text(json.dumps(index))
    return folder
