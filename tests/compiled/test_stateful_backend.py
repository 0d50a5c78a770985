"""A backend with statistics through the artifact: state comes in and goes out, exactly as in an eager loop."""

import pytest
import torch

from apps.training.eager_program import EagerProgram
from tests.compiled.conftest import Compile, Compiled

BACKEND = "tests.backends.stateful_backend:ScaledBackend"
RULES = ({"match": "*.mlp.*", "use": BACKEND}, {"match": "lm_head", "use": BACKEND})


@pytest.fixture(scope="module")
def stateful(compile_step: Compile) -> Compiled:
    """With recompute, the harder case: a block's forward runs twice and its statistics must count once."""
    return compile_step("model.dtype=float64", "compile.recompute=block", "compile.head_chunks=1", rules=RULES)


def test_statistics_and_losses_follow_the_eager_twin(stateful: Compiled) -> None:
    ours, theirs = stateful.model(), stateful.model()
    program = stateful.program(ours)
    twin = EagerProgram(theirs, optimizer="adamw", precision=stateful.plan.precision)
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
