"""Dropout in the step: the regions against the eager twin, and the same masks however a step's rows are dealt out."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from apps.training.step_plan import StepPlan
from compiled.program import CompiledProgram
from modelzoo.dropout import seed_dropout
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.interpreted import InterpretedArtifact

PlanOf = Callable[..., StepPlan]
DROPOUT = ("model.attention_dropout=0.2", "model.residual_dropout=0.1", "model.embedding_dropout=0.3")
ROWS = 8


@pytest.fixture(scope="module")
def interpreted(plan_of: PlanOf) -> Callable[[int], Compiled]:
    """The step of so many rows at a time."""

    @cache
    def capture(rows: int) -> Compiled:
        plan = plan_of("model.dtype=float64", *DROPOUT, f"training.batch_size={rows}")
        return Compiled(plan, InterpretedArtifact(plan), [])

    return capture


def built(step: Compiled, seed: int = 3) -> tuple[Any, CompiledProgram]:
    model = step.model()
    seed_dropout(model, seed)
    return model, step.program(model)


def dealt(step: Compiled, number: int, order: int = 1) -> list[dict[str, Tensor]]:
    """The rows of a step, in microbatches of the artifact's batch size; what they hold does not depend on it."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 96, (ROWS, 17), generator=generator)
    scale = torch.full((ROWS, 16), 1 / (16 * ROWS), dtype=torch.float64)
    whole = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "grad_scale": scale}
    rows = step.plan.spec.batch_size
    parts = range(0, ROWS, rows)
    return [
        {name: tensor[first : first + rows] for name, tensor in whole.items()} | {"first_row": torch.tensor(first)}
        for first in parts
    ][::order]


def train(step: Compiled, program: Any, model: Any, first: int, last: int, order: int = 1) -> list[float]:
    return [
        program.train_step(dealt(step, number, order), step.hyperparameters(model, number), 1.0).loss.item()
        for number in range(first, last + 1)
    ]


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def assert_twins(step: Compiled) -> None:
    ours, program = built(step)
    theirs, _ = built(step)
    twin = EagerProgram(theirs, precision=step.plan.precision)
    assert train(step, program, ours, 1, 3) == pytest.approx(train(step, twin, theirs, 1, 3), rel=1e-12)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)
    batch = dealt(step, 9)[0]
    assert program.evaluate(batch).item() == pytest.approx(twin.evaluate(batch).item(), rel=1e-12)
    states = [
        {name: buffer.item() for name, buffer in model.named_buffers() if "step" in name} for model in (ours, theirs)
    ]
    assert states[0] == states[1]
    assert set(states[0].values()) == {3}


def test_the_regions_equal_the_eager_twin(interpreted: Callable[[int], Compiled]) -> None:
    assert_twins(interpreted(2))


@pytest.mark.slow
def test_the_compiled_step_equals_the_eager_twin(compile_step: Compile) -> None:
    assert_twins(compile_step("model.dtype=float64", "run.recompute=block", *DROPOUT))


@pytest.fixture(scope="module")
def expected(interpreted: Callable[[int], Compiled]) -> tuple[list[float], Tensor]:
    """Losses and weights of four steps of 8 rows at once."""
    step = interpreted(ROWS)
    model, program = built(step)
    return train(step, program, model, 1, 4), weights(model)


@pytest.mark.parametrize("order", [1, -1])
def test_masks_do_not_depend_on_how_rows_are_dealt_and_in_which_order(
    interpreted: Callable[[int], Compiled], expected: tuple[list[float], Tensor], order: int
) -> None:
    step = interpreted(2)
    model, program = built(step)
    assert train(step, program, model, 1, 4, order) == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(weights(model), expected[1], rtol=1e-9, atol=1e-12)


def test_recomputed_activations_have_the_masks_of_the_first_time(
    interpreted: Callable[[int], Compiled], expected: tuple[list[float], Tensor]
) -> None:
    step = interpreted(ROWS)
    model, program = built(step)
    program.recomputed = 1  # of two blocks
    assert train(step, program, model, 1, 4) == expected[0]
    assert torch.equal(weights(model), expected[1])


def test_a_resumed_run_goes_on_with_the_same_masks(
    interpreted: Callable[[int], Compiled], expected: tuple[list[float], Tensor]
) -> None:
    step = interpreted(ROWS)
    before, program = built(step)
    losses = train(step, program, before, 1, 2)
    after, resumed = built(step, seed=99)
    after.load_state_dict(before.state_dict())
    resumed.load_optimizer_state(program.optimizer_state())
    for name, buffer in before.named_buffers():
        after.get_buffer(name).copy_(buffer)
    assert losses + train(step, resumed, after, 3, 4) == expected[0]
    assert torch.equal(weights(after), expected[1])


def test_another_seed_gives_other_losses(
    interpreted: Callable[[int], Compiled], expected: tuple[list[float], Tensor]
) -> None:
    step = interpreted(ROWS)
    model, program = built(step, seed=4)
    assert train(step, program, model, 1, 1) != pytest.approx(expected[0][:1], rel=1e-6)


def test_off_leaves_no_trace_in_the_spec_and_in_the_regions(plan_of: PlanOf) -> None:
    off = [f"{setting.partition('=')[0]}=0.0" for setting in DROPOUT]
    plan, plain = plan_of(*off), plan_of()
    assert plan.spec.model == plain.spec.model
    assert not any(name.startswith("drop_") for name in plain.spec.model)
    assert not [name for name, _ in plan.model.named_buffers()]
