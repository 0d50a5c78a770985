"""What a block gives up when it keeps only dear activations, and that nothing else changes."""

import copy
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch

from apps.training.eager_program import EagerProgram
from apps.training.step_plan import StepPlan
from tests.compiled.conftest import Compiled
from tests.compiled.interpreted import InterpretedArtifact

PlanOf = Callable[..., StepPlan]
TOKENS, HIDDEN, INNER = 2 * 16, 32, 48
CASES: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    ((), {}),
    (("model.residual_dropout=0.2", "model.article_attention=true"), {"attention_bias": True, "mlp_bias": True}),
    (("lora.r=4",), {}),
]


def step_of(plan_of: PlanOf, *settings: str, dtype: str = "float64", **fields: Any) -> Compiled:
    plan = plan_of(f"model.dtype={dtype}", *settings, **fields)
    return Compiled(plan, InterpretedArtifact(plan), [])  # type: ignore[arg-type]


def saved(step: Compiled) -> int:
    """Numbers that a block's forward leaves for its backward."""
    outputs = step.artifact.captured["block_0_forward"].spec.outputs  # type: ignore[attr-defined]
    return sum(prod(spec.shape) for spec in outputs if spec.name.startswith("saved"))


@pytest.fixture(autouse=True)
def on_gpu_too(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Products as a GPU joins them, where a test asks for it."""
    if "joined" in request.node.name:
        monkeypatch.setattr("compiled.schedule.JOINS", ("cpu",))


@pytest.mark.parametrize("kind", ["apart", "joined"])
def test_both_norms_results_and_the_gated_product_are_not_kept(plan_of: PlanOf, kind: str) -> None:
    # in float32: with torch 2.11, attention in float64 is not one operator
    everything, dear = (step_of(plan_of, f"compile.activations={which}", dtype="float32") for which in ("all", "dear"))
    assert saved(everything) - saved(dear) == TOKENS * (2 * HIDDEN + INNER)
    assert everything.plan.spec.key != dear.plan.spec.key


@pytest.mark.parametrize("kind", ["apart", "joined"])
@pytest.mark.parametrize(("settings", "fields"), CASES, ids=["plain", "dropped-biased-articles", "lora"])
def test_training_follows_the_eager_twin(
    plan_of: PlanOf, settings: tuple[str, ...], fields: dict[str, Any], kind: str
) -> None:
    step = step_of(plan_of, "compile.activations=dear", *settings, **fields)
    ours = step.model()
    theirs = copy.deepcopy(ours)
    program, twin = step.program(ours), EagerProgram(theirs, precision=step.plan.precision)
    for number in range(1, 4):
        batches = [step.batch(10 * number + index, 0.8, of=40) for index in range(1 + number % 2)]
        hyper = step.hyperparameters(ours, number)
        result, expected = program.train_step(batches, hyper, 0.5), twin.train_step(batches, hyper, 0.5)
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-10, atol=0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)
