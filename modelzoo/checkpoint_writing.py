"""A model as a plain Hugging Face checkpoint folder that is either complete or not there."""

from __future__ import annotations

import copy
import errno
import fnmatch
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from backends.errors import UserError
from modelzoo import stored_layers
from modelzoo.folder_exchange import exchange, sync
from modelzoo.folder_filling import CANNOT_MOVE, delete, fill, finish_filling, remove_folder, temporary_name

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What an earlier checkpoint leaves in a folder; everything else there is somebody's, and stays.
CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    tokenizer: str | Path | Any | None = None,
    *,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write `model` as `AutoModelForCausalLM.from_pretrained(folder)` reads it without this project; return the folder.

    A model some of whose layers hold other parameters than a weight is the exception: see modelzoo.stored_layers.

    `tokenizer`: a folder to copy the tokenizer's files from, or an object with save_pretrained. Everything is written
    beside `folder`, flushed to the disk and then exchanged for it: until then an earlier checkpoint there is untouched.
    A folder that cannot be exchanged, a mounted volume for example, is filled: see modelzoo.folder_filling.
    Other files in the folder stay. Raises UserError when it cannot be written.
    """
    with written_beside(folder, "checkpoint") as new:
        save_configs(model, new, tokenizer)
        _write_weights(model, new, max_shard_size)
    return Path(folder).expanduser().resolve()


@contextmanager
def written_beside(folder: str | Path, what: str) -> Iterator[Path]:
    """A new folder beside `folder`, whose files take the place of those of the same name there when all is written.

    It lies inside `folder` where that cannot be exchanged. UserError when it cannot be written; then, and after any
    other error, `folder` is as it was.
    """
    target = Path(folder).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"'{folder}' is a file. Expected a folder to save the {what} to.")
    new = temporary_name(target)
    try:
        finish_filling(target)
        new.mkdir(parents=True)
        yield new
        _flush(new)
        _exchange(new, target)
        sync(new.parent)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk with an error of its own
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"Cannot save the {what} to '{folder}': {reason}. Make room, or choose another folder."
        ) from error
    finally:
        remove_folder(new)


def save_configs(model: PreTrainedModel, folder: Path, tokenizer: str | Path | Any | None = None) -> None:
    """Write all of a checkpoint but the weights into the existing `folder`: configs and the tokenizer's files."""
    _write_tokenizer(tokenizer, folder)
    _write_configs(model, folder)


def _write_configs(model: PreTrainedModel, folder: Path) -> None:
    """config.json and generation_config.json, which name the end-of-text token of the tokenizer in `folder`."""
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    if told := stored_layers.describe(model):
        setattr(config, stored_layers.FIELD, told)
    elif hasattr(config, stored_layers.FIELD):  # expanded since it was read
        delattr(config, stored_layers.FIELD)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        _follow_tokenizer(config, generation, folder)
    config.save_pretrained(folder)
    # Not save_pretrained: it refuses some published configs (a temperature without do_sample), after hours of training.
    generation.to_json_file(folder / "generation_config.json")


def _follow_tokenizer(config: Any, generation: GenerationConfig, folder: Path) -> None:
    """Name the tokenizer's end of text: that of a named config trained with another tokenizer would be wrong."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each kind of tokenizer fails in its own way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The tokenizer cannot be loaded: {reason}. Expected a Hugging Face tokenizer folder."
        ) from error
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id in ends:
        return
    for settings in (config, generation):
        settings.eos_token_id, settings.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    generation.pad_token_id = tokenizer.pad_token_id


def _write_weights(model: PreTrainedModel, folder: Path, max_shard_size: int | str) -> None:
    """The weights, in one file or in shards with their index."""
    weights = _distinct_weights(model)
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name].contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
        # safetensors lets nobody else read its files; the other ones are as the user's umask says.
        (folder / file).chmod((folder / "config.json").stat().st_mode)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _distinct_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict without the second name of tied weights, which from_pretrained ties again."""
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
    hollow = [name for name, tensor in weights.items() if tensor.device == torch.device("meta")]
    assert not hollow, f"a model without weights cannot be saved: {hollow[0]} is on the meta device"
    return weights


def _write_tokenizer(tokenizer: str | Path | Any | None, folder: Path) -> None:
    if tokenizer is None:
        return
    if not isinstance(tokenizer, str | Path):
        tokenizer.save_pretrained(folder)
        return
    source = Path(tokenizer).expanduser()
    present = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not present:
        raise UserError(f"The folder '{tokenizer}' has no tokenizer. Expected tokenizer.json or tokenizer.model there.")
    for name in present:
        shutil.copyfile(source / name, folder / name)


def _flush(folder: Path) -> None:
    """Wait until everything under `folder`, and the folder itself, is on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _exchange(new: Path, target: Path) -> None:
    """Move `new` to `target`. Of a folder there before, all but the earlier checkpoint is kept; `new` is what is left.

    A run's folder holds its checkpoints to go on from: at every moment they are under their names.
    """
    if not target.exists():
        os.rename(new, target)
        return
    entries = [entry for entry in target.iterdir() if entry != new]
    kept = [entry for entry in entries if not _belongs_to_checkpoint(entry) and not os.path.lexists(new / entry.name)]
    old = [entry for entry in entries if entry not in kept]
    if new.parent == target:
        fill(new, target, old)
        return
    try:
        for entry in kept:
            _link(entry, new / entry.name)
        sync(new)
        exchange(new, target)
    except OSError as error:
        if error.errno not in CANNOT_MOVE:
            raise
        for entry in kept:
            delete(new / entry.name)
        fill(new, target, old)
        return
    for entry in kept:  # which somebody may have been writing to meanwhile
        _move_missing(new / entry.name, target / entry.name)


def _belongs_to_checkpoint(entry: Path) -> bool:
    return entry.is_file() and any(fnmatch.fnmatch(entry.name, pattern) for pattern in CHECKPOINT_FILES)


def _link(source: Path, target: Path) -> None:
    """A second name, on the disk for certain; not a copy: a log being written to stays the same file."""
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        for entry in source.iterdir():
            _link(entry, target / entry.name)
        shutil.copystat(source, target)
        sync(target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EXDEV:  # of another volume: never copied off it
            raise
        shutil.copy2(source, target, follow_symlinks=False)  # a file system without hard links
        if not target.is_symlink():
            sync(target)


def _move_missing(source: Path, target: Path) -> None:
    if not os.path.lexists(target):
        os.rename(source, target)
    elif source.is_dir() and not source.is_symlink() and target.is_dir():
        for entry in source.iterdir():
            _move_missing(entry, target / entry.name)
