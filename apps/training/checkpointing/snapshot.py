"""A copy of everything a worker saves, taken between two steps without waiting for the device.

On a GPU the copies are made on the device, in the order of its work: right behind step K's update and ahead of step
K+1's, while the host goes on. Where the device has no room for them they go to pinned host memory in the same order;
the device then waits for that copy, the host still does not. The memory is kept for the next snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from apps.training.checkpointing.shares import assign, buffers_of, bytes_of, weight_files, weight_stem, weights_of
from apps.training.checkpointing.tensor_file import write_order

SPARE = 2**30  # bytes of a GPU that copies leave free: the next step may want a little more than the last


class HasOptimizerState(Protocol):
    def optimizer_state(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Snapshot:
    """What one worker writes of one step: `weights` by file; `own`: its share of the optimizer, buffers, RNG.

    `weight_map`: name → file of every weight of the model, and `weight_bytes` of them all, for the index. `event`: when
    the copies are made, None where they are.
    """

    step: int
    weights: dict[str, dict[str, Tensor]]
    own: dict[str, Tensor]
    weight_map: dict[str, str]
    weight_bytes: int
    device: torch.device
    event: torch.cuda.Event | None


@dataclass
class Copies:
    """Memory for copies of tensors, made at the first use of a name, in the order in which they are given."""

    made: dict[str, Tensor] = field(default_factory=dict)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Contiguous copies, in the order of the device's work. `event()` tells when they are made."""
        missing = {name: tensor for name, tensor in tensors.items() if not self._fits(name, tensor)}
        if missing:
            self.made |= _side_by_side(missing, _has_room(missing))
        alike: dict[tuple[torch.dtype, torch.device, torch.device], list[str]] = {}
        for name, tensor in tensors.items():
            alike.setdefault((tensor.dtype, tensor.device, self.made[name].device), []).append(name)
        with torch.no_grad():
            for names in alike.values():  # a kernel for each tensor would hold up a small model
                copies, originals = [self.made[name] for name in names], [tensors[name] for name in names]
                torch._foreach_copy_(copies, originals, non_blocking=True)
        return {name: self.made[name] for name in tensors}

    def _fits(self, name: str, tensor: Tensor) -> bool:
        made = self.made.get(name)
        return made is not None and (made.shape, made.dtype) == (tensor.shape, tensor.dtype)


def take_snapshot(
    step: int,
    model: nn.Module,
    program: HasOptimizerState,
    copies: Copies,
    *,
    rank: int,
    world_size: int,
    is_sharded: bool,
) -> Snapshot:
    """Copy worker `rank`'s share of step `step`; `is_sharded`: its optimizer state is nobody else's, all is written."""
    weights, state = weights_of(model), program.optimizer_state()
    files = weight_files(weights, world_size, weight_stem(model))
    if not is_sharded:  # every worker holds the same
        owners = assign(bytes_of(state), world_size)
        state = {name: tensor for name, tensor in state.items() if owners[name] == rank}
    mine = {name: weights[name] for name, (owner, _) in files.items() if owner == rank}
    ours = {f"weight.{name}": mine[name] for name in write_order(mine)}
    own = {f"optimizer.{name}": tensor.detach() for name, tensor in state.items()}
    own |= {f"buffer.{name}": tensor for name, tensor in buffers_of(model).items()}
    device = next(model.parameters()).device
    own |= {f"rng.{name}": state for name, state in rng_state(device).items()}
    copied = copies.copy(ours | {name: own[name] for name in write_order(own)})
    by_file: dict[str, dict[str, Tensor]] = {}
    for name in ours:
        bare = name.removeprefix("weight.")
        by_file.setdefault(files[bare][1], {})[bare] = copied[name]
    event = None
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record()
    return Snapshot(
        step=step,
        weights=by_file,
        own={name: copied[name] for name in own},
        weight_map={name: file for name, (_, file) in files.items()},
        weight_bytes=sum(bytes_of(weights).values()),
        device=device,
        event=event,
    )


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """PyTorch's random number generators: "cpu", and "cuda" where the model lies on one."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _has_room(tensors: Mapping[str, Tensor]) -> bool:
    on_gpu = [tensor for tensor in tensors.values() if tensor.device.type == "cuda"]
    if not on_gpu:
        return True
    free, _ = torch.cuda.mem_get_info(on_gpu[0].device)
    return free >= sum(tensor.numel() * tensor.element_size() for tensor in on_gpu) + SPARE


def _side_by_side(tensors: Mapping[str, Tensor], on_device: bool) -> dict[str, Tensor]:
    """Memory like the tensors', of each device in one piece: the writer fetches few large parts, not each tensor."""
    made = {}
    for device in {tensor.device for tensor in tensors.values()}:
        ends, end = {}, 0
        for name, tensor in tensors.items():
            if tensor.device == device:
                width = tensor.element_size()
                end = -(-end // width) * width + tensor.nbytes
                ends[name] = end
        pinned = device.type == "cuda" and not on_device
        flat = torch.empty(end, dtype=torch.uint8, device="cpu" if pinned else device, pin_memory=pinned)
        for name, end in ends.items():
            tensor = tensors[name]
            made[name] = flat[end - tensor.nbytes : end].view(tensor.dtype).view(tensor.shape)
    return made
