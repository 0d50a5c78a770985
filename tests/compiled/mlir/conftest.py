"""Small steps captured for MLIR: nothing is compiled, so a case costs its trace and, where asked for, its lowering."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from apps.training.step_plan import StepPlan
from backends.articles import article_spans
from compiled import lowering as inductor
from compiled.capture import Captured
from compiled.regions import RegionSpec
from compiled.schedule import Schedule, capture_step


@dataclass
class CapturedStep:
    plan: StepPlan
    regions: dict[str, Captured]
    schedule: Schedule


Capture = Callable[..., CapturedStep]
LOWRANK = "backend.rules=[{match: '*', use: lowrank, rank: 4}]"
OPTICAL = "backend.rules=[{match: '*.self_attn', use: optical}, {match: '*.down_proj', use: optical}]"


@pytest.fixture(scope="session")
def capture(plan_of: Callable[..., StepPlan]) -> Capture:
    """Captures a small step for MLIR once per session and setting; keywords change the model."""
    known: dict[str, CapturedStep] = {}

    def once(*settings: str, **fields: object) -> CapturedStep:
        key = repr((settings, fields))
        if key not in known:
            plan = plan_of("compile.target=mlir", *settings, **fields)
            with inductor.determinism(True):
                known[key] = CapturedStep(plan, *capture_step(plan.model, plan.spec, plan.optimizers, plan.precision))
        return known[key]

    return once


def random_inputs(spec: RegionSpec, seed: int = 0) -> list[Tensor]:
    """Values a region may be given: small normal numbers, ids below 16, articles that every token is in."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for each in spec.inputs:
        dtype = getattr(torch, each.dtype)
        if each.name == "articles":
            value = article_spans((torch.rand(each.shape[1:], generator=generator) < 0.3).cumsum(1))
        elif dtype is torch.bool:
            value = torch.rand(each.shape, generator=generator) < 0.7
        elif dtype.is_floating_point:
            value = torch.randn(each.shape, generator=generator, dtype=torch.float64)
            is_square = each.name.startswith("exp_avg_sq") or each.name.endswith("_max")
            value = (value.abs() if is_square else -value.abs() if each.name.endswith("_min") else value).to(dtype)
        else:
            value = torch.randint(0, 16, each.shape, generator=generator, dtype=dtype)
        inputs.append(torch.empty_strided(each.shape, each.stride, dtype=dtype).copy_(value))
    return inputs
