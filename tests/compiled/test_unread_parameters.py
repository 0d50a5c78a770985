"""A trained parameter that the forward does not read: its gradient is zero, in a block and in the head."""

import pytest
import torch

from apps.training.eager_program import EagerProgram
from tests.compiled.conftest import Compile

SPARE = "tests.backends.spare_backend:Spare"
RULES = ({"match": "*.down_proj", "use": SPARE}, {"match": "lm_head", "use": SPARE})


@pytest.mark.parametrize("chunks", [1, 2])
def test_its_gradient_is_zero(compile_step: Compile, chunks: int) -> None:
    step = compile_step("model.dtype=float64", f"compile.head_chunks={chunks}", rules=RULES)
    ours, theirs = step.model(), step.model()
    program, twin = step.program(ours), EagerProgram(theirs, precision=step.plan.precision, groups=step.plan.groups)
    batches = [step.batch(seed, of=64) for seed in (1, 2)]
    found, expected = program.gradients(batches), twin.gradients(batches)
    spare = [name for name in expected if name.endswith(".spare")]
    assert len(spare) == 3
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)
    assert all(not found[name].any() for name in spare)
    hyper = step.hyperparameters(ours, 1)
    results = [each.train_step(batches, hyper, 1.0) for each in (program, twin)]
    assert results[0].grad_norm.item() == pytest.approx(results[1].grad_norm.item(), rel=1e-9)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12, msg=name)
