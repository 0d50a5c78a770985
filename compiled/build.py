"""`command=compile`: model and spec → the artifact's bytes. No weights are read or made; 70B compiles on a laptop."""

import hashlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from backends.errors import UserError
from backends.precision import PrecisionPolicy
from compiled import lowering
from compiled.artifact import pack
from compiled.capture import Captured
from compiled.capture_update import Optimizer
from compiled.groups import describe_optimizers
from compiled.mlir.export import module_files
from compiled.mlir.lowering import MlirOptions
from compiled.mlir.whole_step import WholeStep
from compiled.mlir.whole_step_arguments import StepArguments
from compiled.parallel import Report, lower_all
from compiled.regions import RegionSpec
from compiled.schedule import Schedule, capture_step
from compiled.spawned import SpawnedWorkers
from compiled.spec import StepSpec
from compiled.stages import StagedModel


def build(
    model: StagedModel,
    spec: StepSpec,
    optimizers: Mapping[str, Optimizer],
    policy: PrecisionPolicy,
    *,
    teacher: StagedModel | None = None,
    routing: Sequence[Mapping[str, Any]] = (),
    workers: int | None = None,
    debug: Path | None = None,
    report: Report = lambda spec, done, total: None,
    mlir: MlirOptions | None = None,
    floor: Mapping[str, Any] | None = None,
    spawned: SpawnedWorkers | None = None,
) -> bytes:
    """Compile the train step of `model` (on the meta device) for `spec` and return the artifact's bytes.

    `optimizers`: the update rule of each trained parameter, by its full name. `teacher`: a frozen model, on the meta
    device too, whose predictions are learned. `routing`: the rows of the plan that gave
    every layer its backend, for people who inspect the artifact; what a run is compared with is in `spec`. `workers`
    processes lower regions side by side (None: one for each core). `debug` keeps graphs and generated code in that
    folder. `mlir`: modules for another compiler in place of machine code. `floor`: what was measured of this machine
    for runs to be compared with, kept as it is. `spawned`: processes that lower CUDA regions side by side,
    each as soon as it is traced.
    """
    started = time.perf_counter()
    if mlir is None:
        lowering.require_compiler(spec.device["kind"])
    if mlir is not None and mlir.whole_step and teacher is not None:
        raise UserError(
            "compile.mlir.whole_step=true makes one module of a step without a teacher, got "
            "training.distill.model_name_or_path. Drop one of them: the regions know the teacher."
        )
    take = (lambda captured: None) if spawned is None else partial(spawned.begin, debug=debug)
    with lowering.determinism(spec.deterministic):
        regions, schedule = capture_step(model, spec, optimizers, policy, teacher, take)
    traced = time.perf_counter()
    specs = {name: captured.spec for name, captured in regions.items()}
    files = {f"graphs/{name}.txt": lowering.graph_text(captured.graph).encode() for name, captured in regions.items()}
    if debug is not None:
        _keep(debug, files)
    parts: dict[str, Any] = {} if floor is None else {"floor": dict(floor)}
    if mlir is None:
        files |= _machine_code(regions, spec, workers, debug, report, spawned)
    else:
        whole = None
        if mlir.whole_step:
            arguments = StepArguments(regions, schedule, [name for name, _ in model.named_parameters()], policy)
            whole = WholeStep(regions, schedule, arguments, skips=spec.skips_nonfinite)
        modules, parts["mlir"] = module_files(regions, schedule, mlir, workers, report, whole)
        files |= modules
    manifest = {
        "spec": spec.to_json(),
        "routing": list(routing),
        "regions": {name: region.to_json() for name, region in specs.items()},
        "schedule": schedule.to_json(),
        "optimizer": describe_optimizers(optimizers, schedule.updates),
        "parameters": sum(parameter.numel() for _, parameter in model.named_parameters()),
        "trained_parameters": sum(each.numel() for _, each in model.named_parameters() if each.requires_grad),
        "cost": step_cost(specs, schedule, spec, logits_written_over(regions["head_train"])),
        "teacher_bytes": 0 if teacher is None else sum(each.nbytes for _, each in teacher.named_parameters()),
        "trace_seconds": round(traced - started, 2),
        "compile_seconds": round(time.perf_counter() - started, 2),
        **parts,
    }
    return pack(manifest, sorted(files.items()))


def _machine_code(
    regions: Mapping[str, Captured],
    spec: StepSpec,
    workers: int | None,
    debug: Path | None,
    report: Report,
    spawned: SpawnedWorkers | None,
) -> dict[str, bytes]:
    """Lower every region; the artifact's members, with their names and digests filled in in the regions' specs."""
    files = {}
    with (
        tempfile.TemporaryDirectory(prefix="substrate-compile-") as folder,
        lowering.determinism(spec.deterministic),
    ):
        lower_all(dict(regions), spec.device["kind"], Path(folder), workers, debug, report, spawned)
        for name, captured in regions.items():
            region = captured.spec
            region.file = f"regions/{name}"
            files[region.file] = (Path(folder) / name).read_bytes()
            region.sha256 = hashlib.sha256(files[region.file]).hexdigest()
    for name, content in lowering.host_modules(spec.device["kind"]).items():
        files[f"host/{name}"] = content
    return files


def logits_written_over(head: Captured) -> int | None:
    """Bytes of a chunk's logits where a kernel puts their gradient in their place; None: where there is no such one."""
    for node in head.graph.graph.nodes:
        if str(node.target).startswith("substrate.cross_entropy_gradient"):
            return lowering.node_value(node.args[0]).nbytes
    return None


def step_cost(
    regions: dict[str, RegionSpec], schedule: Schedule, spec: StepSpec, logits_bytes: int | None = None
) -> dict[str, Any]:
    """What one step with one microbatch costs.

    flops: matrix products and attention, 2mkn each. bytes: every region's inputs and outputs once, each time it runs.
    hidden_bytes: a block's input; saved_bytes: what else each block keeps for its backward. head_bytes: logits of a
    chunk, their gradient and one temporary; a teacher's and one more; or `logits_bytes` and nothing else.
    """
    runs: dict[str, int] = {"head_train": spec.head_chunks}
    for part in schedule.teacher.get("parts", ()):
        runs[part["forward"]] = runs.get(part["forward"], 0) + 1
    for entry in (schedule.embed, *schedule.blocks):
        runs[entry["forward"]] = runs.get(entry["forward"], 0) + 1
        if entry["backward"]:
            runs[entry["backward"]] = runs.get(entry["backward"], 0) + 1
    for group in schedule.updates:
        if group["direct"]:
            runs[group["direct"]] = runs.get(group["direct"], 0) + 1
    if logits_bytes is None:
        head = {entry.name: entry for entry in regions["head_train"].inputs}
        # rows of the projection, the widest of the head's matrices; a logit is as wide as its token's grad_scale
        logits = 3 + 2 * bool(schedule.teacher)  # and a teacher's, with what is made of them
        vocabulary = max(head[name].shape[0] for name in schedule.head["parameters"] if len(head[name].shape) == 2)
        logits_bytes = logits * vocabulary * head["grad_scale"].bytes
    return {
        "flops": sum(regions[name].flops * count for name, count in runs.items()),
        "bytes": sum(regions[name].bytes * count for name, count in runs.items()),
        "hidden_bytes": regions[schedule.embed["forward"]].outputs[0].bytes,
        "saved_bytes": [regions[entry["forward"]].saved_bytes for entry in schedule.blocks],
        "head_bytes": logits_bytes,
    }


def _keep(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
