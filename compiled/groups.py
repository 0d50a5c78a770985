"""Parameters that are updated together: a group for each block, one for the head (final norm, projection), one for the
embedding.

The head's gradients are final before any block's, the embedding's behind all of them; a tied weight belongs to the
embedding, since both uses add to its gradient.

A group's gradients come in the dtype its backward gives; gradients summed over microbatches come in at least float32.
Where the two differ (bfloat16 parameters) a group has two regions, `direct` and `summed`, so that accumulation stays a
matter of the run. On a GPU there is a third, `paired`: it takes two direct gradients, of two workers or of one's two
microbatches, and adds them itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from backends.precision import PrecisionPolicy, as_torch
from backends.stochastic_rounding import COLUMNS
from compiled.accumulation import accumulation_dtype
from compiled.capture import Captured, Sources
from compiled.capture_update import Optimizer, UpdateCapture, totals_of
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


def head_group(embed: Stage, head: Stage, chunks: int) -> Group:
    """The trained parameters of the head that are not the embedding's too, by their full names.

    Gradients summed over several chunks are wider.
    """
    parameters = {slot.full: p for slot, p in head.trained_parameters().items() if slot.full not in _names(embed)}
    return _end_group(parameters, chunks > 1)


def embed_group(embed: Stage, head: Stage) -> Group:
    """The trained parameters of the embedding, by their full names; a tied weight's gradient is a sum, and wider."""
    parameters = {slot.full: p for slot, p in embed.trained_parameters().items()}
    return _end_group(parameters, not _names(embed).isdisjoint(_names(head)))


def lookup_rows(embed: Stage, head: Stage) -> int | None:
    """How many rows an embedding has whose gradient is zero but for those looked up; None for a tied or frozen one."""
    names = _names(embed)
    if not isinstance(embed.module, nn.Embedding) or not names or not names.isdisjoint(_names(head)):
        return None
    return embed.module.num_embeddings


def _end_group(parameters: dict[str, nn.Parameter], is_sum: bool) -> Group:
    return Group(
        {full: tuple(p.shape) for full, p in parameters.items()},
        {full: accumulation_dtype(p.dtype) if is_sum else p.dtype for full, p in parameters.items()},
        {full: full for full in parameters},
    )


def _names(stage: Stage) -> set[str]:
    return {slot.full for slot in stage.trained_parameters()}


def has_pairs(updates: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every group of a schedule's updates has a region that adds two gradients."""
    return all(entry["direct"] is None or "paired" in entry for entry in updates)


def add_updates(
    regions: dict[str, Captured],
    blocks: list[Stage],
    embed: Stage,
    head: Stage,
    chunks: int,
    optimizers: Mapping[str, Optimizer],
    policy: PrecisionPolicy,
    sources: Sources,
    skips: bool = False,
    pairs: bool = False,
) -> list[dict[str, Any]]:
    """Capture the update of every distinct group; returns a schedule entry for each block, the head, the embedding.

    `optimizers`: the rule of each trained parameter, by its full name. `skips`: as for `UpdateCapture`. `pairs`: with
    regions that add two gradients.
    """
    known: dict[str, dict[str, Any]] = {}
    entries = []
    totals = totals_of(optimizers.values())
    columns = max((len(each.hyperparameter_names) for each in optimizers.values()), default=0)
    columns += COLUMNS if policy.rounding == "stochastic" else 0
    pairs = pairs and not totals and not skips  # these look at all summed gradients before an update
    ends = {"update_head": head_group(embed, head, chunks), "update_embed": embed_group(embed, head)}
    for label, group in [*((None, block_group(block)) for block in blocks), *ends.items()]:
        rules = {local: optimizers[full] for local, full in group.names.items()}
        kind = repr((group.shapes, group.direct, [rule.key for rule in rules.values()]))
        if kind not in known:
            label = label or f"update_{len(known)}"
            known[kind] = _capture_group(regions, label, group, rules, policy, sources, columns, totals, skips, pairs)
        entries.append(known[kind] | {"parameters": group.names})
    return entries


def _capture_group(
    regions: dict[str, Captured],
    label: str,
    group: Group,
    rules: Mapping[str, Optimizer],
    policy: PrecisionPolicy,
    sources: Sources,
    columns: int,
    totals: Sequence[tuple[str, str]],
    skips: bool,
    pairs: bool,
) -> dict[str, Any]:
    """The regions of a group, and the shapes of its parameters' state."""
    if not group.shapes:
        return {"direct": None, "summed": None, "state": {}}
    state = {local: dict(rules[local].state_shapes(shape)) for local, shape in group.shapes.items()}
    tensors = {name: sources.empty(shape, as_torch(policy.parameters)) for name, shape in group.shapes.items()}
    summed = label if group.summed == group.direct else f"{label}_summed"
    entry: dict[str, Any] = {"direct": label, "summed": summed, "state": state}
    wants_sums = any(rule.total_names for rule in rules.values())
    for name, dtypes in {label: group.direct, summed: group.summed}.items():
        capture = UpdateCapture(rules, tensors, dtypes, policy, sources, columns, totals, skips)
        regions[name] = capture.update(name)
        if wants_sums:
            regions[f"total_{name}"] = capture.total(f"total_{name}")
    if pairs:
        entry["paired"] = name = f"{label}_paired"
        capture = UpdateCapture(rules, tensors, group.direct, policy, sources, columns, totals, skips, pairs=True)
        regions[name] = capture.update(name)
    return entry | ({"totals": {key: f"total_{entry[key]}" for key in ("direct", "summed")}} if wants_sums else {})


def describe_optimizers(optimizers: Mapping[str, Optimizer], updates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For the manifest: the names of states and of numbers, each once, and how many elements of state there are."""
    states = [state for entry in updates for state in entry["state"].values()]
    numbers = (name for rule in optimizers.values() for name in rule.hyperparameter_names)
    return {
        "state": list(dict.fromkeys(name for state in states for name in state)),
        "hyperparameters": list(dict.fromkeys(numbers)),
        "totals": [f"{key} {name}" for key, name in totals_of(optimizers.values())],
        "state_elements": sum(math.prod(shape) for state in states for shape in state.values()),
    }
