"""Parameters that are updated together: one group for each block, and one for the two ends (embedding, final norm,
projection).

A group's gradients come in the dtype its backward gives; gradients summed over microbatches come in at least float32.
Where the two differ (bfloat16 parameters) a group has two regions, `direct` and `summed`, so that accumulation stays a
matter of the run.
"""

from dataclasses import dataclass
from typing import Any

import torch

from backends.precision import PrecisionPolicy, as_torch
from compiled.capture import Captured, Sources
from compiled.capture_parts import Optimizer, accumulation_dtype, capture_update
from compiled.stages import Stage


@dataclass(frozen=True)
class Group:
    """Trained parameters by the name the region uses: shape, dtype of the direct gradient, and the model's name."""

    shapes: dict[str, tuple[int, ...]]
    direct: dict[str, torch.dtype]
    names: dict[str, str]

    @property
    def summed(self) -> dict[str, torch.dtype]:
        return {name: accumulation_dtype(dtype) for name, dtype in self.direct.items()}


def block_group(stage: Stage) -> Group:
    """The trained parameters of one block, by their names inside the block, so that equal blocks share a region."""
    parameters = stage.trained_parameters()
    return Group(
        {slot.local: tuple(p.shape) for slot, p in parameters.items()},
        {slot.local: p.dtype for slot, p in parameters.items()},
        {slot.local: slot.full for slot in parameters},
    )


def ends_group(embed: Stage, head: Stage, chunks: int) -> Group:
    """The trained parameters of both ends, by their full names; a tied weight once.

    Gradients that are summed within a microbatch (over several head chunks, or over both uses of a tied weight) are
    wider.
    """
    shapes, direct = {}, {}
    for stage in (embed, head):
        for slot, parameter in stage.trained_parameters().items():
            summed = slot.full in shapes or (stage is head and chunks > 1)
            shapes[slot.full] = tuple(parameter.shape)
            direct[slot.full] = accumulation_dtype(parameter.dtype) if summed else parameter.dtype
    return Group(shapes, direct, {name: name for name in shapes})


def add_updates(
    regions: dict[str, Captured],
    blocks: list[Stage],
    embed: Stage,
    head: Stage,
    chunks: int,
    optimizer: Optimizer,
    policy: PrecisionPolicy,
    sources: Sources,
) -> list[dict[str, Any]]:
    """Capture the update of every distinct group; returns a schedule entry for each block and, last, for the ends."""
    known: dict[str, dict[str, str | None]] = {}
    entries = []
    for index, group in enumerate([*map(block_group, blocks), ends_group(embed, head, chunks)]):
        kind = repr((group.shapes, group.direct))
        if kind not in known:
            label = "update_ends" if index == len(blocks) else f"update_{len(known)}"
            known[kind] = _capture_group(regions, label, group, optimizer, policy, sources)
        entries.append(known[kind] | {"parameters": group.names})
    return entries


def _capture_group(
    regions: dict[str, Captured],
    label: str,
    group: Group,
    optimizer: Optimizer,
    policy: PrecisionPolicy,
    sources: Sources,
) -> dict[str, str | None]:
    if not group.shapes:
        return {"direct": None, "summed": None}
    tensors = {name: sources.empty(shape, as_torch(policy.parameters)) for name, shape in group.shapes.items()}
    regions[label] = capture_update(label, optimizer, tensors, group.direct, policy, sources)
    if group.summed == group.direct:
        return {"direct": label, "summed": label}
    summed = f"{label}_summed"
    regions[summed] = capture_update(summed, optimizer, tensors, group.summed, policy, sources)
    return {"direct": label, "summed": summed}
