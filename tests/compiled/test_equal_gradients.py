"""Two parameters with one gradient, as A and B where A + B is the weight: a region then gives one tensor twice."""

import pytest
import torch

from apps.training.eager_program import EagerProgram
from tests.compiled.conftest import Compile

RULES = ({"match": "*.mlp.*", "use": "tests.backends.two_sum_backend:TwoSum"},)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_each_is_summed_and_clipped_once(compile_step: Compile, microbatches: int) -> None:
    """A rule that is linear in the gradient: a factor too many shows."""
    step = compile_step("model.dtype=float64", "optimizer=sgdm", rules=RULES)
    ours, theirs = step.model(), step.model()
    before = {name: each.detach().clone() for name, each in ours.named_parameters()}
    batches = [step.batch(seed, of=32 * microbatches) for seed in range(microbatches)]
    expected = {name: torch.zeros_like(each) for name, each in before.items()}
    for batch in batches:  # neither program: plain autograd, a microbatch at a time
        logits = theirs(input_ids=batch["input_ids"]).logits.flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
        found = torch.autograd.grad((each * batch["grad_scale"].flatten()).sum(), list(theirs.parameters()))
        for name, gradient in zip(expected, found, strict=True):
            expected[name] += gradient
    norm = torch.stack([each.norm() for each in expected.values()]).norm()
    for program in (step.program(ours), EagerProgram(theirs, precision=step.plan.precision, groups=step.plan.groups)):
        result = program.train_step(batches, step.hyperparameters(ours, 1, lr=0.5), norm.item() / 2)
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-9)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            moved = before[name] - parameter.detach()
            torch.testing.assert_close(moved, 0.25 * expected[name], rtol=1e-5, atol=1e-10, msg=name)
