"""Which worker writes which tensor: a pure function of names and sizes, so that all workers agree without asking."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from backends.lora import lora_layers, trained_parameters


def assign(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Name → worker, for about equally many bytes each: the largest first, each to the worker with the least so far.

    With fewer tensors than workers, the first workers have one each and the others none.
    """
    loads = [0] * world_size
    owners: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        owners[name] = owner
        loads[owner] += max(sizes[name], 1)
    return owners


def bytes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Name → bytes."""
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What a plain Hugging Face checkpoint holds: parameters (a tied one once) and persistent buffers.

    Of a model with low-rank updates only what is trained: the rest comes from the base model again.
    """
    if lora_layers(model):
        return {name: tensor.detach() for name, tensor in trained_parameters(model).items()}
    persistent = model.state_dict().keys()
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items() if name in persistent}


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that low-rank updates stand on; empty for a model whose weights are trained."""
    if not lora_layers(model):
        return {}
    return {name: each.detach() for name, each in model.named_parameters() if not each.requires_grad}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and every byte of the tensors."""
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_digest, tensors.values())
        lines = [f"{name} {digest}" for name, digest in zip(tensors, digests, strict=True)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers a plain checkpoint leaves out: state of the layers' backends."""
    persistent = model.state_dict().keys()
    return {name: tensor.detach() for name, tensor in model.named_buffers() if name not in persistent}


def weight_files(weights: Mapping[str, Tensor], world_size: int, stem: str = "model") -> dict[str, tuple[int, str]]:
    """Name → (worker, file), with the file names transformers gives: one file, or numbered shards and an index.

    `stem`: another beginning of the names, for weights that are not a whole model.
    """
    owners = assign(bytes_of(weights), world_size)
    count = len(set(owners.values()))
    return {
        name: (owner, f"{stem}.safetensors" if count == 1 else f"{stem}-{owner + 1:05}-of-{count:05}.safetensors")
        for name, owner in owners.items()
    }


def weight_stem(model: nn.Module) -> str:
    """How the files of a model's saved weights begin: transformers must not take updates for the model."""
    return "trained" if lora_layers(model) else "model"


def optimizer_file(rank: int, world_size: int) -> str:
    """The file of a worker's share of the optimizer's state."""
    return f"optimizer-{rank + 1:05}-of-{world_size:05}.safetensors"


def _digest(tensor: Tensor) -> str:
    host = tensor.cpu().contiguous()
    digest = hashlib.sha256(f"{host.dtype} {list(host.shape)}".encode())
    digest.update(memoryview(host.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()
