"""From a model to the regions of its train step and the schedule that runs them: the first half of `command=compile`.

Each distinct part is traced once. Blocks are told apart by their structure, so a model of 96 equal blocks is traced
like one of 2; parts of different structure that still trace to one graph share their machine code.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from backends.base import Backend
from backends.kernels.external import external_calls
from backends.precision import PrecisionPolicy
from compiled import lowering
from compiled.capture import Captured, Sources, capture_stage
from compiled.capture_parts import capture_head, head_stage
from compiled.capture_teacher import capture_teacher
from compiled.capture_update import Optimizer
from compiled.groups import add_updates, lookup_rows
from compiled.joining import join
from compiled.lowering_attention import attention_context, mistakes_attention_for_float32
from compiled.spec import StepSpec
from compiled.stages import Stage, StagedModel, make_stage, slots, structure

Regions = dict[str, Captured]
PAIRS = ("cuda",)  # kinds of device that read each other's memory
JOINS = ("cuda",)  # kinds on which one product of several layers is the faster


class _Announced(dict[str, Captured]):
    """Regions by name; each new one goes to `take` as soon as it is there."""

    def __init__(self, take: Callable[[Captured], None]) -> None:
        super().__init__()
        self._take = take

    def __setitem__(self, name: str, captured: Captured) -> None:
        if name not in self:
            self._take(captured)
        super().__setitem__(name, captured)


@dataclass
class Schedule:
    """Which region computes which part, over which of the model's tensors. Plain data; stored in the manifest."""

    embed: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=dict)
    updates: list[dict[str, Any]] = field(default_factory=list)
    teacher: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def capture_step(
    model: StagedModel,
    spec: StepSpec,
    optimizers: Mapping[str, Optimizer],
    policy: PrecisionPolicy,
    teacher: StagedModel | None = None,
    take: Callable[[Captured], None] = lambda captured: None,
) -> tuple[Regions, Schedule]:
    """Trace every distinct part of the step on fake tensors; returns the regions by name and their schedule.

    `optimizers`: the update rule of each trained parameter, by its full name. `teacher`: a frozen model whose
    predictions are learned too. `take` is called with each region as soon as it is traced.
    """
    device_type = spec.device["kind"]
    sources = Sources(lowering.fake_mode(), torch.device(device_type), keeps_cheap=spec.activations == "all")
    for_others = spec.target.get("kind") == "mlir"
    calls = external_calls() if for_others else nullcontext()
    as_products = for_others or mistakes_attention_for_float32(device_type, policy.compute)
    with calls, attention_context(device_type, as_products=as_products), lowering.quiet_torch():
        return _capture_step(_Announced(take), model, spec, optimizers, policy, sources, teacher)


def _capture_step(
    regions: Regions,
    model: StagedModel,
    spec: StepSpec,
    optimizers: Mapping[str, Optimizer],
    policy: PrecisionPolicy,
    sources: Sources,
    teacher: StagedModel | None,
) -> tuple[Regions, Schedule]:
    schedule = Schedule()
    names = model.stages()

    embed, head = make_stage(model, names.embed), head_stage(model)
    blocks = [make_stage(model, path) for path in names.blocks]
    if spec.device["kind"] in JOINS and not spec.target:
        for stage in blocks:
            join(stage, model)

    # first, since they take the longest to lower, and are lowered while the rest is traced
    schedule.updates = add_updates(
        regions,
        blocks,
        embed,
        head,
        spec.head_chunks,
        optimizers,
        policy,
        sources,
        spec.skips_nonfinite,
        pairs=spec.device["kind"] in PAIRS,
    )
    updates = len(regions)

    ids = {"input_ids": sources.empty((spec.batch_size, spec.max_seq_length), torch.int64)}
    schedule.embed, hidden_states = _add_stage(regions, "embed", embed, ids, sources)
    schedule.embed |= slots(embed) | {"lookup_rows": lookup_rows(embed, head)}

    hidden_states = hidden_states.requires_grad_()
    activations = {"hidden_states": hidden_states} | _shared_inputs(model, spec, sources)
    entries: dict[str, dict[str, Any]] = {}
    for stage in blocks:
        kind = structure(stage.module) + repr(stage.joint)
        if kind not in entries:
            entries[kind], _ = _add_stage(regions, f"block_{len(entries)}", stage, activations, sources)
        schedule.blocks.append(entries[kind] | slots(stage))

    teacher_head = None
    if teacher is not None:
        shared = _shared_inputs(teacher, spec, sources)
        taught, schedule.teacher, teacher_head = capture_teacher(teacher, ids, shared, sources)
        for name, captured in taught.items():
            regions[name] = captured

    tokens = spec.batch_size * spec.max_seq_length
    sizes = (tokens, hidden_states.shape[-1], spec.head_chunks)
    for captured in capture_head(head, sources, policy, *sizes, spec.loss_terms, teacher_head):
        regions[captured.spec.name] = captured
    schedule.head = {"train": "head_train", "evaluate": "head_evaluate", "chunks": spec.head_chunks} | slots(head)
    in_running_order = [*list(regions.items())[updates:], *list(regions.items())[:updates]]
    return dict(in_running_order), schedule


def _add_stage(
    regions: Regions, name: str, stage: Stage, activations: dict[str, Tensor], sources: Sources
) -> tuple[dict[str, Any], Tensor]:
    """Capture forward, backward and, where it may be another one, the evaluating forward; also returns the output."""
    stage.module.train()
    forward, backward = capture_stage(name, stage, activations, sources)
    parts = {"forward": forward, "backward": backward, "evaluate": forward}
    if stage.state or _has_outside_backend(stage):
        stage.module.eval()
        parts["evaluate"], _ = capture_stage(f"{name}_evaluate", stage, activations, sources)
        stage.module.train()
    entry: dict[str, Any] = {}
    for role, captured in parts.items():
        if captured is None:
            entry[role] = None
            continue
        twin = next((known for known in regions.values() if known.identity == captured.identity), captured)
        regions[twin.spec.name] = twin
        entry[role] = twin.spec.name
    output = forward.spec.outputs[0]
    return entry, sources.empty(output.shape, getattr(torch, output.dtype))


def _has_outside_backend(stage: Stage) -> bool:
    """Whether a backend computes here that may look at `training` though it keeps no state; the house's do not."""
    backends = (getattr(part, "backend", None) for part in stage.module.modules())
    return any(isinstance(each, Backend) and ":" in each.name for each in backends)


def _shared_inputs(model: StagedModel, spec: StepSpec, sources: Sources) -> dict[str, Tensor]:
    """cos and sin [S, head_dim], and with article attention the articles' spans: the same tensors for every block."""
    cos, sin = model.rotary_tables(spec.max_seq_length, torch.device("cpu"))
    shared = {"cos": sources.like(cos), "sin": sources.like(sin)}
    if spec.article_attention:
        shared["articles"] = sources.empty((2, spec.batch_size, spec.max_seq_length), torch.int32)
    return shared
