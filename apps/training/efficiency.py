"""What a run's steps are measured by: the model's FLOPs, the peak of the devices, the floor of the artifact."""

from __future__ import annotations

import torch

from apps.training.config_schema import TrainConfig
from apps.training.devices import peak_of
from apps.training.floor import device_name
from apps.training.reporting.throughput import Efficiency, training_flops_per_token
from apps.training.step_plan import StepPlan
from apps.training.workers.group import Workers
from compiled.artifact import Artifact


def efficiency_of(
    config: TrainConfig,
    plan: StepPlan,
    artifact: Artifact | None,
    device: torch.device,
    workers: Workers,
    accumulation: int,
) -> Efficiency:
    """Of a step with `accumulation` microbatches a worker. A floor counts on the kind of device it was measured on."""
    length = config.model.max_seq_length
    tokens = config.training.batch_size * accumulation * workers.world_size * length
    flops = tokens * training_flops_per_token(plan.model_config, plan.num_parameters, length)
    peak = config.run.peak_flops or peak_of(device, plan.precision.compute)
    floor = None
    stored = None if artifact is None else artifact.manifest.get("floor")
    if stored is not None and stored["device"] == device_name(device):
        shares = workers.world_size if config.training.shard_optimizer else 1
        floor = accumulation * stored["microbatch_seconds"] + stored["update_seconds"] / shares
    return Efficiency(flops, None if peak is None else peak * workers.world_size, floor)
