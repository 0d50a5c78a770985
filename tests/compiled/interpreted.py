"""Captured graphs run by the interpreter on real tensors: what was traced, without any compiler."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apps.training.step_plan import StepPlan
from compiled import lowering
from compiled.capture import Captured
from compiled.groups import describe_optimizers
from compiled.regions import Region, TensorSpec
from compiled.schedule import capture_step


class InterpretedArtifact:
    """What a `CompiledProgram` wants of an artifact: a whole step in a second, where the machine code is not the point.

    `captured`: the regions by name.
    """

    device_type = "cpu"

    def __init__(self, plan: StepPlan) -> None:
        with lowering.determinism(plan.spec.deterministic):
            self.captured, schedule = capture_step(
                plan.model, plan.spec, plan.optimizers, plan.precision, plan.bare_teacher()
            )
        optimizer = describe_optimizers(plan.optimizers, schedule.updates)
        self.spec: dict[str, Any] = plan.spec.to_json()
        self.manifest: dict[str, Any] = {
            "schedule": schedule.to_json(),
            "optimizer": optimizer,
            "spec": self.spec,
        }

    def load_regions(self) -> dict[str, Region]:
        return {
            name: Region(captured.spec, lambda tensors, graph=captured.graph: graph(*tensors))
            for name, captured in self.captured.items()
        }


def run(captured: Captured, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name; inputs are picked by name, and inputs and outputs have to be what the spec says."""
    inputs = [tensors[spec.name] for spec in captured.spec.inputs]
    for spec, tensor in zip(captured.spec.inputs, inputs, strict=True):
        assert spec.matches(tensor, "cpu"), f"{captured.spec.name}: {spec.name} is {spec}"
    outputs = captured.graph(*inputs)
    for spec, tensor in zip(captured.spec.outputs, outputs, strict=True):
        assert spec.matches(tensor, "cpu"), f"{captured.spec.name} gives {spec.name} as {spec}"
    return {spec.name: tensor for spec, tensor in zip(captured.spec.outputs, outputs, strict=True)}


def random_tensor(spec: TensorSpec, seed: int, below: int = 90) -> Tensor:
    """Normal numbers, or ids in [0, below), of a spec's shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator, dtype=dtype)
    return torch.randint(0, 2 if dtype == torch.bool else below, spec.shape, generator=generator).to(dtype)


def random_inputs(captured: Captured) -> dict[str, Tensor]:
    return {spec.name: random_tensor(spec, seed) for seed, spec in enumerate(captured.spec.inputs)}


def assert_close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tolerance: float = 1e-12) -> None:
    """The same names, and each within `tolerance` of the other side's norm."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        distance = float((ours[name].double() - value.double()).norm())
        assert distance <= tolerance * max(float(value.double().norm()), 1e-30), f"{name} is off by {distance}"
