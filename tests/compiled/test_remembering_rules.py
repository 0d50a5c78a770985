"""An update whose new state holds tensors it was given: all are read before the first is written to."""

import pytest
import torch
from torch import Tensor

from apps.training.config_schema import OptimizerConfig
from apps.training.eager_program import EagerProgram
from apps.training.eager_update import make_updates
from apps.training.parameter_groups import group_parameters
from backends.precision import resolve
from compiled import lowering
from compiled.capture import Sources
from compiled.capture_update import UpdateCapture
from tests.apps.training.optimizers.history import History
from tests.compiled.conftest import Compile
from tests.compiled.interpreted import run

SHAPE, NAME = (3, 4), "tests.apps.training.optimizers.history:History"


def numbers(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def written_out(steps: int) -> dict[str, Tensor]:
    """The rule in variables of Python, which nothing writes to."""
    weight, (last, before, earlier) = numbers(0), torch.zeros(3, *SHAPE)
    for step in range(1, steps + 1):
        moved = weight - 0.1 * (numbers(step) + last / 2 + before / 4) + (weight - earlier) / 8
        last, before, earlier, weight = numbers(step), last, weight, moved
    return {"w": weight, "last": last, "before": before, "weight": earlier}


@pytest.mark.parametrize("skips", [False, True])
def test_as_captured(skips: bool) -> None:
    made = Sources(lowering.fake_mode(), torch.device("cpu"))
    parameters, dtypes = {"w": made.empty(SHAPE, torch.float32)}, {"w": torch.float32}
    update = UpdateCapture({"w": History()}, parameters, dtypes, resolve("float32"), made, 1, skips=skips).update("u")
    live = {"w": numbers(0), "grad_coef": torch.ones(()), "hyperparameters": torch.full((1, 1), 0.1)}
    live |= {f"{state}_w": torch.zeros(SHAPE) for state in History.state_names}
    for step in range(1, 6):
        live["grad_w"] = numbers(step)
        run(update, live)
    for name, expected in written_out(5).items():
        torch.testing.assert_close(live[name if name == "w" else f"{name}_w"], expected)


def test_as_machine_code(compile_step: Compile) -> None:
    """Inductor drops copies that it thinks nobody needs."""
    step = compile_step("model.dtype=float64", f"optimizer={NAME}")
    ours, theirs = step.model(), step.model()
    programs = step.program(ours), EagerProgram(theirs, precision=step.plan.precision, groups=step.plan.groups)
    for number in range(1, 5):
        hyper = step.hyperparameters(ours, number, lr=0.1)
        losses = [program.train_step([step.batch(number)], hyper, None).loss.item() for program in programs]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    left, right = (program.optimizer_state() for program in programs)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-8, atol=1e-12, msg=name)


def test_eagerly() -> None:
    config = OptimizerConfig(name=NAME, settings=History.Config(lr=0.1))
    weights = {"w": numbers(0)}
    (updates,) = make_updates(group_parameters(config, {"w": (SHAPE, "matrix")}), weights)
    for step in range(1, 6):
        updates.step({"w": numbers(step)}, {"w": torch.tensor([0.1])})
    for name, expected in written_out(5).items():
        torch.testing.assert_close(weights["w"] if name == "w" else updates.state["w"][name], expected)
