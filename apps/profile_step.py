"""Show where the time of a compiled train step goes, region by region.

    python apps/train_llm.py command=compile SETTINGS
    python apps/profile_step.py SETTINGS [steps=3] [kernels=3] [trace=outputs/profile/trace.json]
    torchrun --nproc-per-node 2 apps/profile_step.py SETTINGS      with two workers; the first one's times
    python apps/profile_step.py --help

Runs the artifact that a run with SETTINGS would take, on random tokens, without the CUDA graph and without clipping.
The table has a row for each region: calls, time, FLOP/s, bytes/s, the share of its floor, its largest kernels; the
rows' times add up to the step's. The trace opens in Perfetto (https://ui.perfetto.dev).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.profiling.settings import ProfileOptions, read_settings
from apps.training.cli import run_main
from apps.training.workers.launch import find_launch, own_gpu
from backends.errors import UserError

if TYPE_CHECKING:
    from apps.training.config_schema import TrainConfig
    from apps.training.workers.group import Workers


def program(argv: Sequence[str]) -> int:
    options, config = read_settings(argv)
    if config.compile.target == "eager":
        raise UserError("compile.target=eager has no regions to profile. Leave it out, and compile an artifact.")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would say that it starts and stops
    config = replace(config, run=replace(config.run, cuda_graph="off"))  # kernels of a graph belong to no call

    from apps.training.compilers import device_kind
    from apps.training.workers.group import open_workers

    launch = own_gpu(find_launch())
    kind = "cpu" if config.compile.target == "mlir" else device_kind(config.compile.arch)
    with open_workers(launch, device_type=kind, timeout=config.training.worker_timeout) as workers:
        profile(options, config, workers)
    return 0


def profile(options: ProfileOptions, config: TrainConfig, workers: Workers) -> None:
    """Measure the floors, record some steps, print the table."""
    from apps.profiling.recording import label, record
    from apps.profiling.table import caption, profile_table
    from apps.profiling.trace import read_trace
    from apps.training.devices import describe, open_device
    from apps.training.files import require_writable
    from apps.training.floor import measure_floor
    from apps.training.models import load_weights
    from apps.training.programs import blocks_to_recompute, make_program, require_artifact
    from apps.training.random_step import first_hyperparameters, random_batch
    from apps.training.step_plan import plan_step
    from compiled.program import CompiledProgram

    trace, plan = Path(options.trace), plan_step(config)
    require_writable(trace.parent, "trace")
    artifact = require_artifact(config, plan)
    assert artifact is not None  # not the eager twin
    device = open_device(plan.spec.device["kind"], config, workers)
    print(f"Step: {artifact.path}\nDevice: {describe(device)}", flush=True)
    floor = measure_floor(plan, device)  # before the weights are there: it needs memory too
    recomputed = blocks_to_recompute(config, plan, artifact, device, workers)
    model = load_weights(config, plan.model_config, device)
    program = make_program(config, plan, artifact, model, workers, recomputed=recomputed)
    assert isinstance(program, CompiledProgram)
    label(program)
    batch, table = random_batch(plan, device), first_hyperparameters(plan, model, device)
    batch["grad_scale"] /= workers.world_size
    seconds = record(
        lambda: program.train_step([batch], table, None), options.steps, device, trace if workers.is_first else None
    )
    if workers.is_first:
        recorded = read_trace(trace)
        if device.type == "cuda" and not recorded.on_gpu:
            raise UserError(
                "The profiler saw no kernels; this user or container may not use CUPTI, or another profiler does. "
                "Set KINETO_LOG_LEVEL=1 to see what it says."
            )
        print(f"\n{profile_table(recorded, artifact, floor, options.kernels)}\n")
        print(caption(floor, on_gpu=recorded.on_gpu))
        print(f"Mean of {options.steps} steps; without the profiler a step takes {seconds * 1e3:.3f} ms.")
        print(f"Trace for https://ui.perfetto.dev: {trace}")


def main() -> int:
    return run_main(program, many_workers=True)


if __name__ == "__main__":
    sys.exit(main())
