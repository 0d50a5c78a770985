"""`command=compile`: model and spec → artifact. Traces each distinct part once on fake tensors and lowers the parts in parallel."""

import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends.precision import PrecisionPolicy, as_torch

from . import lowering
from .artifact import pack
from .capture import Captured, Sources, capture_stage
from .capture_parts import Optimizer, accumulation_dtype, capture_head, capture_update, head_stage
from .regions import RegionSpec
from .spec import StepSpec
from .stages import Stage, StagedModel, make_stage, structure

Report = Callable[[RegionSpec, int, int], None]  # called for each region when it is done: its spec, how many are, of how many


@dataclass
class Program:
    """The schedule of the manifest: which region computes which part, over which of the model's tensors."""

    embed: dict[str, Any] = field(default_factory=dict)
    blocks: list[dict[str, Any]] = field(default_factory=list)
    head: dict[str, Any] = field(default_factory=dict)
    updates: list[dict[str, Any]] = field(default_factory=list)


def build(
    model: StagedModel,
    spec: StepSpec,
    optimizer: Optimizer,
    policy: PrecisionPolicy,
    *,
    workers: int | None = None,
    debug: Path | None = None,
    report: Report = lambda spec, done, total: None,
) -> bytes:
    """Compile the train step of `model` (on the meta device: no weights are read or made) and return the artifact's bytes.

    `debug` keeps graphs and generated code in that folder. Regions are lowered in `workers` processes (default: as many as cores;
    on CUDA one, whose compiler runs its own pool).
    """
    started = time.perf_counter()
    device_type = spec.device["kind"]
    with lowering.attention_context(device_type):
        regions, program = capture_step(model, spec, optimizer, policy, torch.device(device_type))
    with tempfile.TemporaryDirectory(prefix="substrate-compile-") as folder:
        _lower_all(regions, device_type, Path(folder), workers, debug, report)
        files = {f"regions/{name}": (Path(folder) / name).read_bytes() for name in regions}
    for name, captured in regions.items():
        captured.spec.file = f"regions/{name}"
        captured.spec.sha256 = hashlib.sha256(files[captured.spec.file]).hexdigest()
    texts = {f"graphs/{name}.txt": lowering.graph_text(captured.graph).encode() for name, captured in regions.items()}
    if debug is not None:
        _keep(debug, files | texts)
    specs = {name: captured.spec for name, captured in regions.items()}
    manifest = {
        "spec": spec.to_json(),
        "regions": {name: entry.to_json() for name, entry in specs.items()},
        "program": {"embed": program.embed, "blocks": program.blocks, "head": program.head, "updates": program.updates},
        "optimizer": {"state": list(optimizer.state_names), "hyperparameters": list(optimizer.hyperparameter_names)},
        "parameters": sum(p.numel() for _, p in model.named_parameters()),
        "cost": step_cost(specs, program, spec),
        "compile_seconds": round(time.perf_counter() - started, 2),
    }
    return pack(manifest, [*files.items(), *texts.items()])


def capture_step(
    model: StagedModel, spec: StepSpec, optimizer: Optimizer, policy: PrecisionPolicy, device: torch.device
) -> tuple[dict[str, Captured], Program]:
    """Trace every distinct part of the step; returns the regions by name and the schedule that uses them."""
    sources = Sources(lowering.fake_mode(), device)
    batch, length = spec.batch_size, spec.max_seq_length
    names = model.stages()
    regions: dict[str, Captured] = {}
    program = Program()

    embed = make_stage(model, names.embed)  # type: ignore[arg-type]
    ids = {"input_ids": sources.empty((batch, length), torch.int64)}
    hidden = _add_stage(regions, program.embed, "embed", embed, ids, sources)

    activations = {"hidden_states": hidden} | _shared_inputs(model, spec, sources)
    block_entries: dict[str, dict[str, Any]] = {}
    blocks = [make_stage(model, path) for path in names.blocks]  # type: ignore[arg-type]
    for stage in blocks:
        fingerprint = structure(stage.module)
        if fingerprint not in block_entries:
            block_entries[fingerprint] = entry = {}
            _add_stage(regions, entry, f"block_{len(block_entries) - 1}", stage, activations, sources)
        program.blocks.append(block_entries[fingerprint] | _slots(stage))

    head = head_stage(model)
    captured = capture_head(head, sources, policy, batch * length, hidden.shape[-1], spec.head_chunks)
    regions |= {region.spec.name: region for region in captured}
    program.head = {"train": "head_train", "evaluate": "head_evaluate", "chunks": spec.head_chunks} | _slots(head)

    _add_updates(regions, program, [*blocks, None], [embed, head], optimizer, policy, sources, spec.head_chunks)
    return regions, program


def _slots(stage: Stage) -> dict[str, Any]:
    trainable = {name for name, parameter in stage.module.named_parameters() if parameter.requires_grad}
    return {
        "parameters": {slot.local: slot.full for slot in stage.parameters},
        "trainable": [slot.local for slot in stage.parameters if slot.local in trainable],
        "state": {slot.local: slot.full for slot in stage.state},
    }


def _add_stage(
    regions: dict[str, Captured], entry: dict[str, Any], name: str, stage: Stage, activations: dict[str, Tensor], sources: Sources
) -> Tensor:
    """Capture forward and backward (and, where a backend keeps state, the evaluating forward); returns the stage's output."""
    stage.module.train()
    first = next(iter(activations))
    differentiable = {first: sources.like(activations[first], activations[first].is_floating_point())}
    forward, backward = capture_stage(name, stage, activations | differentiable, sources)
    parts = {"forward": forward, "backward": backward}
    if stage.state:
        stage.module.eval()
        parts["evaluate"], _ = capture_stage(f"{name}_evaluate", stage, activations | differentiable, sources)
        stage.module.train()
    for role, captured in parts.items():
        # layers of different structure may still trace to one graph: share its machine code
        twin = next((known for known in regions.values() if known.identity == captured.identity), captured)
        regions[twin.spec.name] = twin
        entry[role] = twin.spec.name
    entry.setdefault("evaluate", entry["forward"])
    entry |= _slots(stage)
    output = forward.spec.outputs[0]
    return sources.empty(output.shape, getattr(torch, output.dtype))


def _shared_inputs(model: StagedModel, spec: StepSpec, sources: Sources) -> dict[str, Tensor]:
    """cos and sin [S, head_dim], and with article attention the mask [B, 1, S, S]: the same tensors for every block."""
    cos, sin = model.rotary_tables(spec.max_seq_length, torch.device("cpu"))
    shared = {"cos": sources.like(cos), "sin": sources.like(sin)}
    if spec.article_attention:
        shared["mask"] = sources.empty((spec.batch_size, 1, spec.max_seq_length, spec.max_seq_length), torch.bool)
    return shared


def _add_updates(
    regions: dict[str, Captured],
    program: Program,
    blocks: list[Stage | None],
    ends: list[Stage],
    optimizer: Optimizer,
    policy: PrecisionPolicy,
    sources: Sources,
    chunks: int,
) -> None:
    """One update region for each distinct group of parameters; groups are the blocks, and the two ends together.

    Gradients come in the dtype the backward gives; gradients summed over microbatches in at least float32. Where these differ (bfloat16
    parameters) a group has two regions.
    """
    known: dict[str, dict[str, str]] = {}
    for stage in blocks:
        group = _block_group(stage) if stage else _ends_group(ends)
        direct = {name: dtype for name, (_, dtype) in group["tensors"].items()}
        if not stage:
            direct |= _ends_dtypes(ends, chunks)
        tensors = {name: sources.empty(shape, as_torch(policy.parameters)) for name, (shape, _) in group["tensors"].items()}
        if not tensors:
            program.updates.append({"direct": None, "summed": None, "parameters": {}})
            continue
        fingerprint = repr((group["tensors"], direct))
        if fingerprint not in known:
            summed = {name: accumulation_dtype(dtype) for name, dtype in direct.items()}
            label = f"update_{len(known)}" if stage else "update_ends"
            regions[label] = capture_update(label, optimizer, tensors, direct, policy, sources)
            known[fingerprint] = {"direct": label, "summed": label}
            if summed != direct:
                regions[f"{label}_summed"] = capture_update(f"{label}_summed", optimizer, tensors, summed, policy, sources)
                known[fingerprint]["summed"] = f"{label}_summed"
        program.updates.append(known[fingerprint] | {"parameters": group["names"]})


def _block_group(stage: Stage) -> dict[str, Any]:
    parameters = {name: p for name, p in stage.module.named_parameters() if p.requires_grad}
    return {
        "names": {slot.local: slot.full for slot in stage.parameters if slot.local in parameters},
        "tensors": {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()},
    }


def _ends_group(ends: list[Stage]) -> dict[str, Any]:
    tensors = {}
    for stage in ends:
        parameters = dict(stage.module.named_parameters())
        for slot in stage.parameters:
            if parameters[slot.local].requires_grad:
                tensors.setdefault(slot.full, (tuple(parameters[slot.local].shape), parameters[slot.local].dtype))
    return {"names": {name: name for name in tensors}, "tensors": tensors}


def _ends_dtypes(ends: list[Stage], chunks: int) -> dict[str, torch.dtype]:
    """Gradient dtypes at the two ends: summed ones (several chunks; a tied weight, used at both ends) are wider."""
    embed, head = ends
    used_twice = {slot.full for slot in embed.parameters} & {slot.full for slot in head.parameters}
    parameters = {slot.full: dict(head.module.named_parameters())[slot.local] for slot in head.parameters}
    return {
        name: accumulation_dtype(p.dtype)
        for name, p in parameters.items()
        if p.requires_grad and (chunks > 1 or name in used_twice)
    }


def _lower_all(
    regions: dict[str, Captured], device_type: str, folder: Path, workers: int | None, debug: Path | None, report: Report
) -> None:
    jobs = min(workers or lowering.compile_threads(), len(regions))
    parallel = device_type == "cpu" and jobs > 1
    # Forked workers inherit the traced graphs, which cannot be pickled; they go by name.
    global _jobs
    _jobs = (regions, device_type, folder, debug)
    done = 0
    try:
        if not parallel:
            for name in regions:
                done += 1
                _finish(regions[name], _lower_one(name), report, done, len(regions))
            return
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork"), initializer=_one_thread) as pool:
            order = sorted(regions, key=lambda name: -regions[name].spec.nodes)  # the longest first
            futures: dict[str, Future[tuple[int, float]]] = {name: pool.submit(_lower_one, name) for name in order}
            for name in order:
                done += 1
                _finish(regions[name], futures[name].result(), report, done, len(regions))
    finally:
        _jobs = None


_jobs: tuple[dict[str, Captured], str, Path, Path | None] | None = None


def _one_thread() -> None:
    # a forked child must not enter an OpenMP region its parent's threads are gone from
    torch.set_num_threads(1)


def _lower_one(name: str) -> tuple[int, float]:
    assert _jobs is not None
    regions, device_type, folder, debug = _jobs
    started = time.perf_counter()
    captured = regions[name]
    kernels = lowering.lower(captured.graph, captured.inputs, device_type, folder / name, debug / name if debug else None)
    return kernels, time.perf_counter() - started


def _finish(captured: Captured, outcome: tuple[int, float], report: Report, done: int, total: int) -> None:
    captured.spec.kernels, captured.spec.seconds = outcome[0], round(outcome[1], 2)
    report(captured.spec, done, total)


def _keep(debug: Path, members: dict[str, bytes]) -> None:
    for name, content in members.items():
        path = debug / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def step_cost(specs: dict[str, RegionSpec], program: Program, spec: StepSpec) -> dict[str, int]:
    """FLOPs and bytes of one step with one microbatch, and the bytes of memory a run needs (see `apps/training/memory.py`)."""
    runs: dict[str, int] = {}
    for entry in (program.embed, *program.blocks):
        forwards = 2 if spec.recompute == "block" and entry is not program.embed else 1
        runs[entry["forward"]] = runs.get(entry["forward"], 0) + forwards
        runs[entry["backward"]] = runs.get(entry["backward"], 0) + 1
    runs["head_train"] = spec.head_chunks
    for group in program.updates:
        if group["direct"]:
            runs[group["direct"]] = runs.get(group["direct"], 0) + 1
    saved = [specs[entry["forward"]] for entry in program.blocks]
    hidden = specs[program.embed["forward"]].outputs[0].bytes
    kept = [hidden + (0 if spec.recompute == "block" else region.saved_bytes) for region in saved]
    return {
        "flops": sum(specs[name].flops * count for name, count in runs.items()),
        "bytes": sum(specs[name].bytes * count for name, count in runs.items()),
        "activation_bytes": sum(kept) + (max(region.saved_bytes for region in saved) if spec.recompute == "block" else 0),
        "head_bytes": 3 * spec.batch_size * spec.max_seq_length // spec.head_chunks * _vocabulary(specs) * 4,
        "region_bytes": max(region.bytes for region in specs.values()),
    }


def _vocabulary(specs: dict[str, RegionSpec]) -> int:
    weights = [entry.shape[0] for entry in specs["head_train"].inputs if len(entry.shape) == 2]
    return max(weights, default=0)
