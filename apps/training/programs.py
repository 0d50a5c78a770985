"""What runs the step: a compiled artifact that fits this run, or the eager twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from apps.training.activations import FILLED
from apps.training.config_schema import TrainConfig
from apps.training.distilling import load_teacher
from apps.training.eager_program import EagerProgram
from apps.training.loss import loss_terms
from apps.training.memory import (
    MemoryEstimate,
    available_memory,
    compiled_estimate,
    eager_activations,
    estimate,
    of_one_worker,
    with_snapshot,
    with_statistics,
)
from apps.training.parameter_groups import state_elements
from apps.training.step_plan import StepPlan, compile_command
from apps.training.trainer import Program
from apps.training.workers.group import Workers
from apps.training.workers.peer_copies import MOST_WORKERS, PeerCopies, peers_in_reach
from apps.training.workers.reducer import GradientReducer
from backends.errors import UserError
from backends.precision import BITS, as_torch
from compiled.artifact import Artifact, Nearest, find, open_artifact
from compiled.cuda_graph import GraphedProgram
from compiled.groups import has_pairs
from compiled.program import CompiledProgram
from compiled.reduction import Reducer
from compiled.spec import difference_table


def require_artifact(config: TrainConfig, plan: StepPlan) -> Artifact | None:
    """The artifact of `run.artifact`, or the one in `compile.output_dir` that fits; None for `compile.target=eager`.

    UserError when there is none or it was made for another step: the fields that differ, and the command to compile it.
    """
    if config.compile.target == "eager":
        if config.run.cuda_graph == "on":
            raise UserError(
                "run.cuda_graph=on needs a compiled step, got compile.target=eager. Use run.cuda_graph=auto."
            )
        return None
    command = compile_command(config)
    if config.run.artifact is not None:
        artifact = open_artifact(Path(config.run.artifact))
        artifact.require(plan.spec, command)
        return artifact
    folder = Path(config.compile.output_dir)
    found = find(folder, plan.spec)
    if isinstance(found, Artifact):
        return found
    if isinstance(found, Nearest):
        raise UserError(
            f"No artifact in '{folder}' fits this run; the nearest, {found.artifact.path.name}, differs as below. "
            f"Compile one: {command}\n{difference_table(found.differences)}"
        )
    raise UserError(f"There is no artifact in '{folder}'. Compile one: {command}")


def make_program(
    config: TrainConfig,
    plan: StepPlan,
    artifact: Artifact | None,
    model: Any,
    workers: Workers,
    *,
    recomputed: int = 0,
) -> Program:
    """The program that trains `model` in place, one of `workers` alike; `recomputed` as in `run_memory`'s estimate."""
    precision, reducer, terms = plan.precision, _reducer(config, workers), loss_terms(config.training)
    teacher = None
    if plan.teacher_config is not None:
        teacher = load_teacher(config, plan.teacher_config, next(model.parameters()).device)
    if artifact is None:
        return EagerProgram(
            model,
            teacher=teacher,
            groups=plan.groups,
            precision=precision,
            reducer=reducer,
            loss_terms=terms,
            skips_nonfinite=plan.spec.skips_nonfinite,
            stats_every=config.logging.stats_every,
        )
    master = None if precision.master == "none" else as_torch(precision.master)
    return _program_class(config.run.cuda_graph, artifact)(
        artifact,
        model,
        teacher=teacher,
        moments_dtype=as_torch(precision.moments),
        master_dtype=master,
        reducer=reducer,
        loss_terms=terms,
        stats_every=config.logging.stats_every,
        recomputed=recomputed,
    )


def _reducer(config: TrainConfig, workers: Workers) -> Reducer | None:
    """What sums gradients over the workers; None for one."""
    training = config.training
    if training.shard_optimizer and config.compile.target == "eager":
        raise UserError(
            "training.shard_optimizer=true needs a compiled step, got compile.target=eager. Drop one of them."
        )
    if workers.world_size == 1:
        return None
    assert workers.device_group is not None
    return GradientReducer(
        workers.device_group,
        rank=workers.rank,
        world_size=workers.world_size,
        dtype=None if training.reduce_dtype == "auto" else as_torch(training.reduce_dtype),
        bucket_bytes=training.reduce_bucket_mb * 2**20,
        shards=training.shard_optimizer,
        before_waiting=lambda: workers.waiting("waiting for the others' gradients"),
        copies=_peer_copies(training.reduce_by, workers),
    )


def _peer_copies(asked: str, workers: Workers) -> PeerCopies | None:
    """How the GPUs of one host sum by copies, if all of them can; None: by collectives."""
    assert workers.device_group is not None
    on_gpus = dist.get_backend(workers.device_group) == "nccl"
    can = asked != "collectives" and on_gpus and peers_in_reach(workers.world_size, workers.local_world_size)
    (able,) = workers.sum_counts(int(can))
    if able == workers.world_size:
        return PeerCopies(workers.device_group, rank=workers.rank, world_size=workers.world_size)
    if asked == "copies":
        raise UserError(
            f"training.reduce_by=copies needs GPUs of one host that read each other's memory, 2 to {MOST_WORKERS}, all "
            f"visible to each worker; {able} of {workers.world_size} workers have that. Use training.reduce_by=auto."
        )
    return None


def _program_class(cuda_graph: str, artifact: Artifact) -> type[CompiledProgram]:
    """Replayed as one CUDA graph, or region by region."""
    if artifact.device_type != "cuda":
        if cuda_graph == "on":
            raise UserError(
                f"run.cuda_graph=on needs a CUDA artifact, {artifact.path} is for the {artifact.device_type}. "
                "Use run.cuda_graph=auto."
            )
        return CompiledProgram
    return CompiledProgram if cuda_graph == "off" else GraphedProgram


def run_memory(
    config: TrainConfig, plan: StepPlan, artifact: Artifact | None, *, accumulation: int, world_size: int, free: int
) -> MemoryEstimate:
    """What this worker of the run, one of `world_size`, will hold at its peak; `accumulation`: its microbatches.

    With run.recompute=auto it recomputes as many blocks as must be for the run to fit into `free` bytes.
    """
    blocks = 0 if artifact is None else len(artifact.manifest["cost"]["saved_bytes"])
    choices = {"auto": range(blocks + 1), "none": range(1), "block": range(blocks, blocks + 1)}[config.run.recompute]
    for recomputed in choices:
        needed = _memory(config, plan, artifact, accumulation, world_size=world_size, recomputed=recomputed)
        if needed.total <= free * FILLED:
            break
    return needed


def blocks_to_recompute(
    config: TrainConfig,
    plan: StepPlan,
    artifact: Artifact | None,
    device: Any,
    workers: Workers | None = None,
    accumulation: int = 1,
) -> int:
    """What a run of `accumulation` microbatches decides, before its weights are there; `workers` None: it is alone."""
    workers = workers or Workers.solo()
    free = available_memory(str(device), workers.local_world_size, config.run.memory_gib)
    size = workers.world_size
    return run_memory(config, plan, artifact, accumulation=accumulation, world_size=size, free=free).recomputed


def _memory(
    config: TrainConfig,
    plan: StepPlan,
    artifact: Artifact | None,
    accumulation: int,
    *,
    world_size: int,
    recomputed: int,
) -> MemoryEstimate:
    precision, training, several = plan.precision, config.training, accumulation > 1
    waits = training.max_grad_norm is not None or training.max_nonfinite_steps > 0  # for all gradients, to judge them
    num_parameters = plan.num_parameters
    if artifact is not None:
        looks = waits or training.max_grad_value is not None or config.logging.stats_every is not None
        pairs = (
            accumulation == 2 and world_size == 1 and not looks and has_pairs(artifact.manifest["schedule"]["updates"])
        )
        wide = several and not pairs
        whole = compiled_estimate(artifact.manifest, precision, several_microbatches=wide, recomputed=recomputed)
    else:
        length = config.model.max_seq_length
        batch_size = training.batch_size
        whole = estimate(
            num_parameters,
            precision,
            state_tensors=state_elements(plan.groups) / plan.num_trained,
            activations=eager_activations(plan.model_config, precision, batch_size=batch_size, seq_length=length),
            wide_gradients=several or BITS[precision.parameters] < BITS["float32"],
            num_trained=plan.num_trained,
        )
        teacher = plan.bare_teacher()
        whole = replace(whole, teacher=0 if teacher is None else sum(each.nbytes for each in teacher.parameters()))
    if artifact is not None and not (several or waits or artifact.manifest["optimizer"]["totals"]):
        whole = replace(whole, gradients=whole.gradients * 2 * _largest_group(artifact, plan) // plan.num_trained)
    mine = of_one_worker(whole, plan.num_trained, world_size, shards=training.shard_optimizer)
    if config.logging.stats_every is not None:
        share = world_size if training.shard_optimizer else 1
        mine = with_statistics(mine, precision, plan.num_trained // share)
    if config.checkpoint.save and plan.spec.device["kind"] == "cpu":  # a GPU's goes to the host, which has more
        saved = plan.num_trained * BITS[precision.parameters] // 8 if plan.lora is not None else None
        return with_snapshot(mine, world_size, shards=training.shard_optimizer, saved_weights=saved)
    return mine


def _largest_group(artifact: Artifact, plan: StepPlan) -> int:
    """Numbers in the largest group of parameters. Without clipping, two groups' gradients are there at most."""
    sizes = {name: parameter.numel() for name, parameter in plan.model.named_parameters()}
    groups = artifact.manifest["schedule"]["updates"]
    return max(sum(sizes[name] for name in group["parameters"].values()) for group in groups)
