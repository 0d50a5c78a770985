"""A model with the weights of a Hugging Face checkpoint folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from backends.errors import UserError
from backends.precision import BITS, as_torch
from modelzoo.build import build_meta, finish, put_parameter
from modelzoo.checkpoint_files import StoredTensor, open_checkpoint

# Old transformers stored the rotary frequencies; the config says them.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_model(
    path: str | Path,
    config: Any,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The model of a zoo config, in evaluation mode, with the weights in the folder `path`.

    `dtype` None: the dtype of most of the stored weights, float32 for float16. One tensor at a time is read, cast and
    moved, so a model needs its own size in memory and no more. `progress(done, total)` is called with bytes read.
    Everything is checked before memory is taken. Raises UserError when the folder, a shard or all weights are missing,
    a file is damaged, or names, shapes or kinds of tensors are not those of the config.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder '{path}'. Expected a Hugging Face model folder with weights.")
    stored = _with_model_names(open_checkpoint(folder))
    model = build_meta(config, _stored_dtype(stored.values()) if dtype is None else dtype)
    _check_kinds(folder, stored)
    sources = _match(folder, model, stored)
    _put_all(model, sources, torch.device(device), progress)
    finish(model)
    model.config.name_or_path = model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = _generation_config(folder)
    return model.eval()


def _with_model_names(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Names as in the causal language model: a checkpoint of the bare model leaves the prefix out."""
    kept = {name: tensor for name, tensor in stored.items() if not IGNORED.search(name)}
    if any(name.startswith("model.") for name in kept):
        return kept
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in kept.items()}


def _stored_dtype(stored: Iterable[StoredTensor]) -> torch.dtype:
    """The dtype that holds most of the numbers, where it is one that we compute in."""
    elements: dict[torch.dtype | str, int] = {}
    for tensor in stored:
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    most = max(elements, key=lambda dtype: elements[dtype], default=torch.float32)
    ours = [as_torch(name) for name in BITS]
    return most if isinstance(most, torch.dtype) and most in ours else torch.float32


def _check_kinds(folder: Path, stored: dict[str, StoredTensor]) -> None:
    for name, tensor in stored.items():
        if isinstance(tensor.dtype, str):
            raise UserError(
                f"{name} in '{folder}' is stored as {tensor.dtype}. Expected plain floating-point weights: "
                "a quantized checkpoint has to be dequantized first."
            )


def _match(folder: Path, model: PreTrainedModel, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Which stored tensor goes into which parameter; one UserError for all that does not fit."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    stored = dict(stored)
    if model.config.tie_word_embeddings and HEAD in stored:
        _drop_tied_head(folder, stored)
    problems = [
        _listed("missing", [name for name in wanted if name not in stored]),
        _listed("not in the model", [name for name in stored if name not in wanted]),
        _listed("of another shape", [
            f"{name} (checkpoint {list(stored[name].shape)}, config {list(shape)})"
            for name, shape in wanted.items()
            if name in stored and stored[name].shape != shape
        ]),
    ]  # fmt: skip
    if any(problems):
        told = "; ".join(problem for problem in problems if problem)
        raise UserError(
            f"The weights in '{folder}' are not those of the config. {told}. Use the config.json that belongs to them."
        )
    return {name: stored[name] for name in wanted}


def _drop_tied_head(folder: Path, stored: dict[str, StoredTensor]) -> None:
    """A tied model has one matrix: take whichever is stored, and refuse two that differ."""
    head = stored.pop(HEAD)
    if EMBEDDING not in stored:
        stored[EMBEDDING] = head
    elif not torch.equal(head.read(), stored[EMBEDDING].read()):
        raise UserError(
            f"The config of '{folder}' ties the head to the embedding, but {HEAD} and {EMBEDDING} differ there. "
            "Set tie_word_embeddings to false in config.json."
        )


def _put_all(
    model: PreTrainedModel,
    sources: dict[str, StoredTensor],
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> None:
    total, done = sum(_bytes(tensor) for tensor in sources.values()), 0
    # In the order of the files, which is the order on the disk.
    for name in sorted(sources, key=lambda name: (sources[name].file, name)):
        dtype = model.get_parameter(name).dtype
        # A copy even where nothing is cast: the stored tensor is a view of the file, and its alignment is the file's.
        values = torch.empty(sources[name].shape, dtype=dtype, device=device).copy_(sources[name].read())
        put_parameter(model, name, values)
        done += _bytes(sources[name])
        if progress is not None:
            progress(done, total)


def _bytes(tensor: StoredTensor) -> int:
    assert isinstance(tensor.dtype, torch.dtype)
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"Cannot read '{folder / 'generation_config.json'}': {reason}. Repair or remove the file."
        ) from error


def _listed(what: str, names: list[str], at_most: int = 3) -> str:
    if not names:
        return ""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return f"{what[0].upper()}{what[1:]}: {', '.join(names[:at_most])}{more}"
