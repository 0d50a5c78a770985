"""`command=compile`: settings → one artifact file, and what a person wants to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from apps.training.compilers import compilers_of
from apps.training.config_schema import TrainConfig
from apps.training.files import atomic_path, require_writable
from apps.training.floor import Floor, measure_floor
from apps.training.memory import compiled_estimate, gibibytes
from apps.training.progress import Progress
from apps.training.reporting.lines import short
from apps.training.step_plan import StepPlan
from backends.routing_table import count_text, plain_table
from compiled.artifact import Artifact, open_artifact
from compiled.build import build
from compiled.mlir.compilers import compiler_name
from compiled.mlir.extra import require_extra
from compiled.mlir.isolation import Limits
from compiled.mlir.lowering import MlirOptions
from compiled.regions import RegionSpec
from compiled.spawned import SpawnedWorkers


def compile_artifact(config: TrainConfig, plan: StepPlan, compilers: SpawnedWorkers | None = None) -> Artifact:
    """Compile the planned step into `compile.output_dir`; nothing is left there when it fails.

    `compilers`: those of `compilers_of` that were started early; else they start now.
    """
    target = Path(config.compile.output_dir) / plan.spec.file_name
    require_writable(target.parent, "compile.output_dir")  # before the work, not after it
    if config.compile.target == "mlir":
        require_extra("torch_mlir")
    debug = debug_folder(target) if config.compile.debug else None
    with compilers_of(config.compile) if compilers is None else nullcontext(compilers) as spawned:
        floor = measured_floor(plan)
        content = compiled_step(config, plan, debug, floor, spawned)
    with atomic_path(target) as temporary:
        temporary.write_bytes(content)
    return open_artifact(target)


def compiled_step(
    config: TrainConfig, plan: StepPlan, debug: Path | None, floor: Floor | None, spawned: SpawnedWorkers | None
) -> bytes:
    """The artifact's bytes; shows progress."""
    # from before the tracing, so that the first region's time counts; how many there are is known with the first
    with Progress(None, "Compiling", "regions", mode=config.logging.progress) as progress:

        def report(region: RegionSpec, done: int, total: int) -> None:
            progress.total = total
            progress.update(1, last=region.name)

        return build(
            plan.model,
            plan.spec,
            plan.optimizers,
            plan.precision,
            teacher=plan.bare_teacher(),
            routing=plan.routing.to_json(),
            workers=config.compile.workers,
            debug=debug,
            report=report,
            mlir=mlir_options(config),
            floor=None if floor is None else floor.to_json(),
            spawned=spawned,
        )


def measured_floor(plan: StepPlan) -> Floor | None:
    """The floor of the step on the GPU it is compiled for. A CPU's is left out: the model may be too large to measure,
    and other work on the machine would spoil it."""
    return None if plan.spec.device["kind"] == "cpu" else measure_floor(plan, torch.device("cuda", 0))


def mlir_options(config: TrainConfig) -> MlirOptions | None:
    """What compile.mlir says, for `compile.target=mlir`; None for machine code."""
    if config.compile.target != "mlir":
        return None
    settings = config.compile.mlir
    limits = Limits(settings.timeout_s, settings.memory_gb)
    compiler = compiler_name(settings.compiler, settings.dialect)
    return MlirOptions(settings.dialect, settings.whole_step, compiler, limits)


def debug_folder(artifact: Path) -> Path:
    """Where `compile.debug=true` keeps the graphs and the generated code of an artifact."""
    return artifact.with_suffix(".debug")


def summary(artifact: Artifact, plan: StepPlan) -> str:
    """What `command=compile` prints at the end."""
    manifest, spec = artifact.manifest, plan.spec
    cost = manifest["cost"]
    tokens = spec.batch_size * spec.max_seq_length
    rows = [
        ("Artifact", str(artifact.path)),
        ("Size", gibibytes(artifact.path.stat().st_size)),
        ("Distinct regions", f"{len(manifest['regions'])} for {len(manifest['schedule']['blocks'])} blocks"),
        ("Compile time", f"{manifest['compile_seconds']:.1f} s, of which tracing {manifest['trace_seconds']:.1f} s"),
        ("Parameters", f"{manifest['parameters']:,}"),
        ("FLOPs per step", f"{count_text(cost['flops'])}  ({count_text(cost['flops'] / tokens)} per token)"),
        ("Bytes per step", gibibytes(cost["bytes"])),
        *([("Floor", floor_text(manifest["floor"], tokens))] if "floor" in manifest else []),
        ("Expected memory", str(compiled_estimate(manifest, plan.precision, several_microbatches=False))),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name + ':':{width + 1}} {value}" for name, value in rows)


def floor_text(floor: Mapping[str, Any], tokens: int) -> str:
    """`185.0 ms, 88.6k tokens/s on NVIDIA H200`: a step of one microbatch of `tokens`, at the least."""
    seconds = floor["microbatch_seconds"] + floor["update_seconds"]
    return f"{seconds * 1e3:.1f} ms, {short(tokens / seconds)} tokens/s on {floor['device']}"


def region_table(artifact: Artifact) -> str:
    """One row for each region: graph size, saved activations, kernels, seconds (`compile.verbose=true`)."""
    rows = [("region", "graph nodes", "inputs", "outputs", "saved", "FLOPs", "bytes", "kernels", "seconds", "code")]
    for name, region in artifact.region_specs().items():
        rows.append(
            (
                name,
                str(region.nodes),
                str(len(region.inputs)),
                str(len(region.outputs)),
                gibibytes(region.saved_bytes),
                count_text(region.flops),
                gibibytes(region.bytes),
                str(region.kernels),
                f"{region.seconds:.1f}",
                region.sha256[:8],
            )
        )
    return plain_table(rows, right=range(1, 9))
