"""A backend with statistics through the artifact: state comes in and goes out, exactly as in an eager loop."""

import pytest
import torch

from apps.training.eager_program import EagerProgram
from backends.errors import UserError
from tests.compiled.conftest import Compile, Compiled

DELAYED = "tests.backends.delayed_backend:DelayedBackend"
BACKEND = "tests.backends.stateful_backend:ScaledBackend"
RULES = ({"match": "*.mlp.*", "use": BACKEND}, {"match": "lm_head", "use": BACKEND})


@pytest.fixture(scope="module")
def stateful(compile_step: Compile) -> Compiled:
    """With recompute, the harder case: a block's forward runs twice and its statistics must count once."""
    return compile_step("model.dtype=float64", "run.recompute=block", "compile.head_chunks=1", rules=RULES)


def test_statistics_and_losses_follow_the_eager_twin(stateful: Compiled) -> None:
    ours, theirs = stateful.model(), stateful.model()
    program = stateful.program(ours)
    twin = EagerProgram(theirs, precision=stateful.plan.precision)
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    for step in (1, 2, 3):
        batches = [stateful.batch(step, of=64), stateful.batch(step + 9, of=64)]
        hyper = stateful.hyperparameters(ours, step)
        result, expected = program.train_step(batches, hyper, 1.0), twin.train_step(batches, hyper, 1.0)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)
    assert any(not torch.equal(before[name], buffer) for name, buffer in ours.named_buffers())
    for (name, mine), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_evaluation_and_gradients_leave_statistics_alone(stateful: Compiled) -> None:
    model = stateful.model()
    program = stateful.program(model)
    program.train_step([stateful.batch(1)], stateful.hyperparameters(model, 1), None)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    first = program.evaluate(stateful.batch(2)).item()
    program.gradients([stateful.batch(3)])
    assert program.evaluate(stateful.batch(2)).item() == first
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


@pytest.fixture(scope="module")
def delayed(compile_step: Compile) -> Compiled:
    """Ranges from the steps before, noise by row: also in the head, which sees a chunk of tokens at a time."""
    rules = ({"match": "*_proj", "use": DELAYED}, {"match": "lm_head", "use": DELAYED})
    return compile_step("model.dtype=float64", "run.recompute=block", "compile.head_chunks=2", rules=rules)


def pieces(batch: dict[str, torch.Tensor], rows: int) -> list[dict[str, torch.Tensor]]:
    """The batch as microbatches of `rows` rows that know where they lie in it."""
    count = len(batch["input_ids"])
    return [
        {name: tensor[first : first + rows] for name, tensor in batch.items()} | {"first_row": torch.tensor(first)}
        for first in range(0, count, rows)
    ]


def whole(delayed: Compiled, step: int) -> dict[str, torch.Tensor]:
    halves = [delayed.batch(10 * step + half, of=64) for half in (0, 1)]
    return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def test_a_step_in_pieces_equals_the_whole_batch_in_numbers_and_in_state(delayed: Compiled) -> None:
    ours, theirs = delayed.model(), delayed.model()
    program = delayed.program(ours)
    twin = EagerProgram(theirs, precision=delayed.plan.precision)
    program.calibrate(pieces(whole(delayed, 0), 2))
    twin.calibrate([whole(delayed, 0)])
    for step in (1, 2, 3):
        hyper = delayed.hyperparameters(ours, step)
        result = program.train_step(pieces(whole(delayed, step), 2), hyper, 1.0)
        expected = twin.train_step([whole(delayed, step)], hyper, 1.0)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)
        assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-9)
    for (name, mine), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        if not name.endswith("first_row"):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert ours.lm_head.step.item() == 4, "calibration and three steps, whatever the number of pieces"


def test_where_the_rows_lie_matters(delayed: Compiled) -> None:
    model = delayed.model()
    program = delayed.program(model)
    program.calibrate(pieces(whole(delayed, 0), 2))
    first, second = pieces(whole(delayed, 1), 2)
    assert program.evaluate(first) != program.evaluate(first | {"first_row": second["first_row"]})


def test_evaluation_before_anything_was_seen_is_refused(delayed: Compiled) -> None:
    model = delayed.model()
    twin = EagerProgram(delayed.model(), precision=delayed.plan.precision)
    for program in (delayed.program(model), twin):
        with pytest.raises(UserError, match=r"Layer 'model.layers.0.self_attn.q_proj' is not calibrated: least, most"):
            program.evaluate(delayed.batch(1))
