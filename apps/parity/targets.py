"""One train step through several targets (the eager twin, Inductor, MLIR): losses, gradients, weights, time.

All artifacts are made before any of them runs: making one forks, which a process must not once IREE's runtime is there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from apps.parity.batches import Batches
from apps.parity.entries import Entry
from apps.parity.settings import CompareSettings
from apps.parity.target_entries import Target
from apps.training.compile_command import compile_artifact
from apps.training.config import parse
from apps.training.config_schema import ModelConfig, TrainConfig
from apps.training.config_yaml import written
from apps.training.hyperparameters import hyperparameter_table
from apps.training.models import load_weights
from apps.training.programs import make_program
from apps.training.progress import Progress
from apps.training.recipe import make_recipe
from apps.training.step_plan import StepPlan, plan_step
from apps.training.workers.group import Workers
from backends.precision import as_torch, at_least_float32
from backends.state import Stateful
from compiled.artifact import Artifact, find


@dataclass(frozen=True)
class Planned:
    """A target's settings and step, before anything is compiled."""

    name: str
    config: TrainConfig
    plan: StepPlan


@dataclass(frozen=True)
class TargetResult:
    """What a target computed: a loss a step, gradients of the first batch at the given weights, the last weights.

    `seconds`: the median of the steps after the first, which loads and warms up.
    """

    name: str
    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    seconds: float


def plan_targets(targets: Sequence[Target], entry: Entry, settings: CompareSettings) -> list[Planned]:
    """The targets' steps, which differ in the section `compile`. UserError for settings that do not go together."""
    device = "cpu" if any(each.settings["target"] == "mlir" for each in targets) else settings.device
    names, standard = settings.checkpoint, ModelConfig()
    arguments = ["command=compile", f"training.batch_size={settings.batch_size}", f"training.seed={settings.seed}"]
    arguments += [f"checkpoint.{key}={value}" for key, value in vars(names).items() if value is not None]
    changed = {key: value for key, value in vars(settings.model).items() if value != getattr(standard, key)}
    arguments += [f"model.{key}={written(value)}" for key, value in changed.items()]
    arguments += [f"backend.rules={written([dict(rule) for rule in entry.rules])}"] if entry.rules else []
    default = entry.default if isinstance(entry.default, str) else dict(entry.default)
    arguments += [f"backend.default={written(default)}", f"compile.arch={device}"]
    arguments += [f"logging.progress={settings.progress}"]
    configs = [parse([*arguments, *target.arguments]) for target in targets]
    return [Planned(target.name, config, plan_step(config)) for target, config in zip(targets, configs, strict=True)]


def artifact_of(planned: Planned) -> Artifact | None:
    """The artifact in `compile.output_dir` that fits, or a new one there; None for the eager twin."""
    if planned.config.compile.target == "eager":
        return None
    found = find(Path(planned.config.compile.output_dir), planned.plan.spec)
    return found if isinstance(found, Artifact) else compile_artifact(planned.config, planned.plan)


def run_target(
    planned: Planned, artifact: Artifact | None, batches: Batches, settings: CompareSettings
) -> TargetResult:
    """A step for each measured batch, at each parameter's peak rate."""
    config, plan = planned.config, planned.plan
    model = load_weights(config, plan.model_config, batches.device)
    program: Any = make_program(config, plan, artifact, model, Workers.solo())
    if any(isinstance(layer, Stateful) and layer.state_specs for layer in model.modules()):
        for batch in batches.calibration():
            program.calibrate([batch])
    measured = batches.measured()
    gradients = _on_host(program.gradients([measured[0]]))
    recipe = make_recipe(config, plan.groups, len(measured))
    names = [name for name, _ in model.named_parameters()]
    dtype = as_torch(at_least_float32(plan.precision.parameters))
    losses, seconds = [], []
    with Progress(len(measured), planned.name, "steps", mode=settings.progress) as progress:
        for step, batch in enumerate(measured, start=1):
            table = hyperparameter_table(
                names, plan.groups, step=step, rate=lambda peak: peak, dtype=dtype, rounding_seed=recipe.rounding_seed
            )
            started = time.perf_counter()
            losses.append(program.train_step([batch], table, recipe.max_grad_norm, recipe.max_grad_value).loss.item())
            seconds.append(time.perf_counter() - started)
            progress.update()
    weights = {name: each for name, each in model.named_parameters() if each.requires_grad}
    return TargetResult(planned.name, losses, gradients, _on_host(weights), median(seconds[1:] or seconds))


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of their own: what a program gave may be its memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def distance(found: Tensor, expected: Tensor) -> float:
    """|found − expected| / |expected|, Euclidean; 0 where both are zero, infinite where only the reference is."""
    difference = float((found.double() - expected.double()).norm())
    size = float(expected.double().norm())
    return difference / size if size else (torch.inf if difference else 0.0)
