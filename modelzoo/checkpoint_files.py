"""What lies in a Hugging Face checkpoint folder: which tensor, of which shape, in which file.

safetensors and PyTorch's .bin, in one file or in shards with an index. Only headers are read until a tensor is wanted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from backends.errors import UserError

# In the order in which transformers looks for them.
SINGLE_AND_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. `read()` may return a view of the mapped file: copy it before the file changes."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a str when it is not one of the floating-point types that a plain checkpoint has
    file: Path
    read: Callable[[], Tensor]


def open_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """The tensors stored in `folder`, by name.

    Raises UserError when there are no weights, a file that the index names is missing or lacks a tensor, or a file
    cannot be read.
    """
    for single, index in SINGLE_AND_INDEX:
        if (folder / single).is_file():
            return open_file(folder / single)
        if (folder / index).is_file():
            return _open_shards(folder / index)
    names = ", ".join(name for pair in SINGLE_AND_INDEX for name in pair)
    raise UserError(f"The folder '{folder}' has no weights. Expected one of: {names}.")


def _open_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = _read_weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise UserError(
            f"'{index}' names {len(files)} files, of which {len(missing)} are not in the folder: {_few(missing)}. "
            "Copy them there, or download the checkpoint again."
        )
    stored: dict[str, StoredTensor] = {}
    for name in files:
        stored.update(open_file(index.parent / name))
    lacking = [f"{tensor} (in {file})" for tensor, file in weight_map.items() if tensor not in stored]
    if lacking:
        raise UserError(
            f"'{index}' names tensors that its files do not hold: {_few(lacking)}. "
            "Index and files are of different checkpoints; download it again."
        )
    return stored


def _read_weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): str(file) for tensor, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"Cannot read '{index}' as a checkpoint index ({type(error).__name__}). Expected JSON with a weight_map."
        ) from error


def open_file(file: Path) -> dict[str, StoredTensor]:
    try:
        return _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)
    except UserError:
        raise
    except Exception as error:  # safetensors, zipfile and pickle each have errors of their own
        reason = " ".join(str(error).split())[:200]
        size = f"{file.stat().st_size:,} bytes" if file.exists() else "gone"
        raise UserError(
            f"Cannot read '{file}' ({size}): {reason}. It is incomplete or damaged: copy or download it again."
        ) from error


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    opened: Any = safe_open(file, framework="pt")  # maps the file; it is closed with the last reference
    stored = {}
    for name in opened.keys():  # noqa: SIM118 (not a dict)
        part = opened.get_slice(name)
        code = part.get_dtype()
        shape = tuple(part.get_shape())
        stored[name] = StoredTensor(shape, FLOATS.get(code, code), file, _reader(opened.get_tensor, name))
    return stored


def _open_bin(file: Path) -> dict[str, StoredTensor]:
    try:
        content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except RuntimeError:  # files of torch before 1.6 are no zip archives, and cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise UserError(f"'{file}' holds a {type(content).__name__}. Expected a state dict: names with tensors.")
    stored = {}
    for name, tensor in content.items():
        dtype = tensor.dtype if tensor.dtype in FLOATS.values() else str(tensor.dtype).removeprefix("torch.")
        stored[name] = StoredTensor(tuple(tensor.shape), dtype, file, _reader(content.__getitem__, name))
    return stored


def _reader(read: Callable[[str], Tensor], name: str) -> Callable[[], Tensor]:
    return lambda: read(name)


def _few(names: list[str], at_most: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more
