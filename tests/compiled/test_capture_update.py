"""The optimizer's update as captured, against AdamW written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.config_schema import OptimizerConfig
from apps.training.hyperparameters import hyperparameter_table
from apps.training.optimizers.adamw import AdamW
from apps.training.parameter_groups import group_parameters
from backends.precision import PrecisionPolicy, resolve
from compiled import lowering
from compiled.capture import Captured, Sources
from compiled.capture_update import UpdateCapture
from tests.compiled.interpreted import assert_close, run

SHAPES = {"weight": (3, 4), "bias": (4,)}
GROUPS = group_parameters(
    OptimizerConfig(settings=AdamW.Config(lr=0.01, weight_decay=0.3, beta2=0.95)),
    {"weight": (SHAPES["weight"], "matrix"), "bias": (SHAPES["bias"], "vector")},
)


def captured_update(policy: PrecisionPolicy, gradient: torch.dtype) -> Captured:
    made = Sources(lowering.fake_mode(), torch.device("cpu"))
    parameters = {name: made.empty(shape, getattr(torch, policy.parameters)) for name, shape in SHAPES.items()}
    rules, columns = dict.fromkeys(SHAPES, AdamW()), len(AdamW.hyperparameter_names)
    return UpdateCapture(rules, parameters, dict.fromkeys(SHAPES, gradient), policy, made, columns).update("update")


def take_steps(captured: Captured, start: dict[str, Tensor], steps: int, coefficient: float) -> dict[str, Tensor]:
    """The region over several steps with gradients from a generator; returns the live tensors."""
    specs = {spec.name: spec for spec in captured.spec.inputs}
    state = {
        name: torch.zeros(specs[name].shape, dtype=getattr(torch, specs[name].dtype)) for name in captured.spec.mutated
    }
    live: dict[str, Any] = state | start
    work = getattr(torch, specs["grad_coef"].dtype)
    live["grad_coef"] = torch.tensor(coefficient, dtype=work)
    for step in range(1, steps + 1):
        live["hyperparameters"] = hyperparameter_table(
            SHAPES, GROUPS, step=step, rate=lambda peak, step=step: peak / step, dtype=work
        )
        for name, gradient in gradients_of(step).items():
            live[f"grad_{name}"] = gradient.to(getattr(torch, specs[f"grad_{name}"].dtype))
        run(captured, live)
    return live


def gradients_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def adamw(start: dict[str, Tensor], steps: int, coefficient: float) -> dict[str, Tensor]:
    """Loshchilov & Hutter (2019), algorithm 2, in numbers of Python and float64 tensors; matrices alone decay."""
    values = {name: value.double() for name, value in start.items()}
    mean = {name: torch.zeros_like(value) for name, value in values.items()}
    square = {name: torch.zeros_like(value) for name, value in values.items()}
    for step in range(1, steps + 1):
        lr = 0.01 / step
        for name, gradient in gradients_of(step).items():
            gradient = gradient * coefficient
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.95 * square[name] + 0.05 * gradient**2
            direction = (mean[name] / (1 - 0.9**step)) / ((square[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.3 if values[name].ndim > 1 else 0.0
            values[name] = values[name] * (1 - lr * decay) - lr * direction
    return values


def starting_point(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(77)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("coefficient", [1.0, 0.25])
def test_the_update_is_adamw_in_place(coefficient: float) -> None:
    captured = captured_update(resolve("float64"), torch.float64)
    start = starting_point(torch.float64)
    expected = adamw(start, 5, coefficient)
    live = take_steps(captured, start, 5, coefficient)
    assert_close({name: live[name] for name in SHAPES}, expected)
    assert live["weight"] is start["weight"]
    assert set(captured.spec.mutated) == {
        f"{part}{name}" for name in SHAPES for part in ("", "exp_avg_", "exp_avg_sq_")
    }


def test_bfloat16_parameters_are_copies_of_masters_that_are_updated() -> None:
    """Steps far below bfloat16's spacing still add up."""
    captured = captured_update(resolve("bfloat16"), torch.bfloat16)
    start = starting_point(torch.bfloat16)
    masters = {f"master_{name}": value.float() for name, value in start.items()}
    expected = adamw(start, 5, 1.0)
    live = take_steps(captured, start | masters, 5, 1.0)
    assert_close({name: live[f"master_{name}"] for name in SHAPES}, expected, tolerance=2e-3)  # bfloat16 gradients
    assert all(torch.equal(live[name], live[f"master_{name}"].bfloat16()) for name in SHAPES)


def test_every_number_of_the_optimizer_is_an_input() -> None:
    """No rate or decay is written in the graph, so that one artifact serves them all."""
    captured = captured_update(resolve("float64"), torch.float64)
    numbers = {
        argument
        for node in captured.graph.graph.nodes
        for argument in node.args
        if isinstance(argument, float) and argument not in (0.0, 1.0)
    }
    assert not numbers
