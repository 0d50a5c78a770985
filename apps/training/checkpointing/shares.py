"""Which worker writes which tensor: a pure function of names and sizes, so that all workers agree without asking."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


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
    """What a plain Hugging Face checkpoint holds: parameters (a tied one once) and persistent buffers."""
    persistent = model.state_dict().keys()
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items() if name in persistent}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """The buffers a plain checkpoint leaves out: state of the layers' backends."""
    persistent = model.state_dict().keys()
    return {name: tensor.detach() for name, tensor in model.named_buffers() if name not in persistent}


def weight_files(weights: Mapping[str, Tensor], world_size: int) -> dict[str, tuple[int, str]]:
    """Name → (worker, file), with the file names transformers gives: one file, or numbered shards and an index."""
    owners = assign(bytes_of(weights), world_size)
    count = len(set(owners.values()))
    return {
        name: (owner, "model.safetensors" if count == 1 else f"model-{owner + 1:05}-of-{count:05}.safetensors")
        for name, owner in owners.items()
    }


def optimizer_file(rank: int, world_size: int) -> str:
    """The file of a worker's share of the optimizer's state."""
    return f"optimizer-{rank + 1:05}-of-{world_size:05}.safetensors"
