"""Clipping by value and skipped updates in the step: the regions against the eager twin, torch and bits left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.training.eager_program import EagerProgram
from apps.training.step_plan import StepPlan
from compiled.clipping import clip_values
from compiled.program import CompiledProgram
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.interpreted import InterpretedArtifact

PlanOf = Callable[..., StepPlan]
RULES = ({"match": "*.mlp.*", "use": "tests.backends.delayed_backend:DelayedBackend"},)
SKIPS = "training.max_nonfinite_steps=3"


@pytest.fixture(scope="module")
def skipping(plan_of: PlanOf) -> Compiled:
    """A step that can skip its update, with backends that keep state."""
    plan = plan_of("model.dtype=float64", SKIPS, f"backend.rules=[{{match: '*.mlp.*', use: '{RULES[0]['use']}'}}]")
    return Compiled(plan, InterpretedArtifact(plan), list(RULES))


@pytest.fixture(scope="module")
def plain(plan_of: PlanOf) -> Compiled:
    plan = plan_of("model.dtype=float64")
    return Compiled(plan, InterpretedArtifact(plan), [])


def everything(model: Any, program: Any) -> dict[str, Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers()) | program.optimizer_state()
    return {name: tensor.detach().clone() for name, tensor in tensors.items() if not name.endswith("first_row")}


def pair(step: Compiled) -> tuple[tuple[Any, CompiledProgram], tuple[Any, EagerProgram]]:
    ours, theirs = step.model(), step.model()
    precision, skips = step.plan.precision, step.plan.spec.skips_nonfinite
    return (ours, step.program(ours)), (theirs, EagerProgram(theirs, precision=precision, skips_nonfinite=skips))


def poisoned(step: Compiled, seed: int, value: float) -> dict[str, Tensor]:
    batch = step.batch(seed)
    batch["grad_scale"][0, 0] = value
    return batch


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_skips(step: Compiled, programs: list[tuple[Any, Any]]) -> None:
    """Steps 2 and 3 of 4 are not finite: nothing changes in them, and the rest is what the twins agree on."""
    for model, program in programs:
        applied = []
        for number in range(1, 5):
            bad = {2: torch.nan, 3: torch.inf}.get(number)
            batches = [step.batch(number, of=64), step.batch(9, of=64) if bad is None else poisoned(step, 9, bad)]
            before = everything(model, program)
            result = program.train_step(batches, step.hyperparameters(model, number), 1.0)
            applied.append(bool(result.applied))
            after = everything(model, program)
            if bad is not None:
                assert_equal(
                    {k: v for k, v in after.items() if not k.endswith(".step")},
                    {k: v for k, v in before.items() if not k.endswith(".step")},
                )
            else:
                changed = [name for name in before if not torch.equal(before[name], after[name])]
                assert any(name.endswith("weight") for name in changed)
        assert applied == [True, False, False, True]
    one, two = (dict(model.named_parameters()) | dict(model.named_buffers()) for model, _ in programs)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_step_that_is_not_finite_leaves_weights_moments_and_backends_alone(skipping: Compiled) -> None:
    assert_skips(skipping, list(pair(skipping)))


def test_a_skipped_first_step_counts_as_a_step_for_both(skipping: Compiled) -> None:
    models = []
    for model, program in pair(skipping):
        for number, batch in ((1, poisoned(skipping, 1, torch.nan)), (2, skipping.batch(2))):
            program.train_step([batch], skipping.hyperparameters(model, number), None)
        models.append(dict(model.named_parameters()))
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-9, atol=1e-12, msg=name)


def test_finite_steps_have_the_bits_of_a_step_that_cannot_skip(plain: Compiled, plan_of: PlanOf) -> None:
    plan = plan_of("model.dtype=float64", SKIPS)
    able = Compiled(plan, InterpretedArtifact(plan), [])
    results = []
    for step in (plain, able):
        model = step.model()
        program = step.program(model)
        for number in (1, 2):
            result = program.train_step([step.batch(number)], step.hyperparameters(model, number), 0.5)
        results.append(everything(model, program))
        assert (result.applied is None) == (step is plain)
    assert_equal(*results)


def test_a_step_that_cannot_skip_has_the_regions_it_always_had(plain: Compiled, skipping: Compiled) -> None:
    regions = plain.artifact.captured, skipping.artifact.captured  # type: ignore[attr-defined]
    wheres = [
        sum(node.target is torch.ops.aten.where.self for node in captured["update_0"].graph.graph.nodes)
        for captured in regions
    ]
    assert wheres == [0, 27]  # nine parameters of a block and two moments each
    assert regions[0]["update_0"].spec.inputs == regions[1]["update_0"].spec.inputs


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_clipping_by_value_is_torchs_and_comes_before_the_norm(
    plain: Compiled, max_norm: float | None, microbatches: int
) -> None:
    bound = 1e-3
    (ours, program), (theirs, twin) = pair(plain)
    batches = [plain.batch(seed, of=32 * microbatches) for seed in range(microbatches)]
    for parameter, gradient in zip(theirs.parameters(), twin.gradients(batches).values(), strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_value_(theirs.parameters(), bound)
    assert max(parameter.grad.abs().max().item() for parameter in theirs.parameters()) == bound
    if max_norm is not None:
        nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
    expected = {name: 0.1 * parameter.grad.clone() for name, parameter in theirs.named_parameters()}
    for model, each in ((ours, program), (theirs, twin)):
        each.train_step(batches, plain.hyperparameters(model, 1), max_norm, bound)
    found = {name.removesuffix(".exp_avg"): m for name, m in program.optimizer_state().items() if "exp_avg" in name}
    for name, moment in expected.items():
        torch.testing.assert_close(program.optimizer_state()[f"{name}.exp_avg"], moment, rtol=1e-9, atol=1e-15)
    assert found
    for one, two in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_values_are_clipped_in_place_and_nan_stays() -> None:
    gradients = {"a": torch.tensor([-3.0, 0.5, torch.nan, torch.inf]), "b": torch.tensor([2.0], dtype=torch.bfloat16)}
    clip_values(gradients, 1.0)
    torch.testing.assert_close(gradients["a"], torch.tensor([-1.0, 0.5, torch.nan, 1.0]), equal_nan=True)
    assert gradients["b"].item() == 1.0
    clip_values(gradients, None)
    clip_values({}, 1.0)


@pytest.mark.parametrize("masters", ["float32", "stochastic"])
def test_bfloat16_parameters_are_left_alone_with_masters_and_without(plan_of: PlanOf, masters: str) -> None:
    plan = plan_of("model.dtype=bfloat16", SKIPS, f"optimizer.master_weights={masters}")
    step = Compiled(plan, InterpretedArtifact(plan), [])
    model = step.model()
    program = step.program(model)
    program.train_step([step.batch(1)], step.hyperparameters(model, 1), 1.0)
    before = everything(model, program)
    result = program.train_step([poisoned(step, 2, torch.inf)], step.hyperparameters(model, 2), None)
    assert not result.applied
    assert_equal(everything(model, program), before)
    assert program.train_step([step.batch(3)], step.hyperparameters(model, 3), None).applied


@pytest.mark.slow
def test_the_compiled_step_skips_as_its_twin_does(compile_step: Compile) -> None:
    step = compile_step("model.dtype=float64", SKIPS, rules=RULES)
    assert_skips(step, list(pair(step)))
