"""The compiled step with low-rank updates: regions over frozen weights, groups without a parameter, workers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from apps.training.step_plan import StepPlan
from compiled.capture import Captured
from compiled.schedule import Schedule, capture_step
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.step_worker import STEPS, run_job, table, whole_batch
from tests.compiled.test_many_workers import distance, settings_of

SETTINGS = ("model.dtype=float64", "lora.r=4", "lora.alpha=8", "compile.head_chunks=4")
HEAD_TOO = "lora.match=['*_proj', lm_head]"
PlanOf = Callable[..., StepPlan]


def captured(plan: StepPlan) -> tuple[dict[str, Captured], Schedule]:
    return capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)


def test_frozen_parts_have_no_backward_and_no_update(plan_of: PlanOf) -> None:
    regions, schedule = captured(plan_of(*SETTINGS))
    assert schedule.embed["backward"] is None
    assert schedule.embed["trained"] == schedule.head["trained"] == []
    assert schedule.updates[-1] == {"direct": None, "summed": None, "state": {}, "parameters": {}}
    trained = schedule.blocks[0]["trained"]
    assert len(trained) == 14
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    assert {block["forward"] for block in schedule.blocks} == {"block_0_forward"}
    assert not [spec.name for spec in regions["head_train"].spec.outputs if spec.name.startswith("grad_lm")]


def test_updated_weights_are_made_again_in_the_backward_instead_of_being_kept(plan_of: PlanOf) -> None:
    saved = {}
    for settings in (SETTINGS, SETTINGS[:1]):
        regions, _ = captured(plan_of(*settings))
        saved[settings] = regions["block_0_forward"].spec.saved_bytes
    assert saved[SETTINGS] <= saved[SETTINGS[:1]]


def test_rank_scale_layers_and_norms_are_part_of_the_step(plan_of: PlanOf) -> None:
    variants = [
        plan_of("lora.r=4", *more).spec.key
        for more in ((), ("lora.alpha=8",), ("lora.match=[q_proj]",), ("lora.train_norms=true",))
    ]
    variants += [plan_of().spec.key, plan_of("lora.r=5").spec.key]
    assert len(set(variants)) == len(variants)
    assert plan_of("lora.r=4", "lora.merge=false").spec.key == variants[0]


@pytest.fixture(scope="module")
def updates(compile_step: Compile) -> Compiled:
    return compile_step(*SETTINGS)


def assert_follows_the_twin(compiled: Compiled, clip: float | None, microbatches: int) -> None:
    ours, theirs = compiled.model(), compiled.model()
    program = compiled.program(ours)
    twin = EagerProgram(theirs, precision=compiled.plan.precision)
    before = {name: each.detach().clone() for name, each in ours.named_parameters()}
    for step in range(1, 6):
        batches = [compiled.batch(10 * step + index, 0.7, of=20) for index in range(microbatches)]
        hyper = compiled.hyperparameters(ours, step)
        result, expected = program.train_step(batches, hyper, clip), twin.train_step(batches, hyper, clip)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)
        if clip is not None:
            assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-10)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if mine.requires_grad:
            assert not torch.equal(mine, before[name])
            assert distance(mine, other) <= 1e-8, name
        else:
            assert torch.equal(mine, before[name])
            assert torch.equal(other, before[name])
    trained = {name for name, each in ours.named_parameters() if each.requires_grad}
    for state in (program.optimizer_state(), twin.optimizer_state()):
        assert {key.rpartition(".")[0] for key in state} == trained


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "microbatches"), [(None, 1), (0.05, 3)])
def test_training_equals_the_eager_twin_and_leaves_frozen_weights_alone(
    updates: Compiled, clip: float | None, microbatches: int
) -> None:
    assert_follows_the_twin(updates, clip, microbatches)


@pytest.mark.slow
def test_norms_and_the_head_train_too_and_recompute_changes_nothing(compile_step: Compile) -> None:
    settings = ("model.dtype=float64", "lora.r=4", "lora.train_norms=true", "run.recompute=block", HEAD_TOO)
    compiled = compile_step(*settings)
    trained = {name for name, each in compiled.model().named_parameters() if each.requires_grad}
    assert {"model.norm.weight", "lm_head.lora_A"} <= trained
    assert_follows_the_twin(compiled, clip=1.0, microbatches=2)


@pytest.mark.slow
def test_two_workers_equal_one(updates: Compiled, tmp_path: Path) -> None:
    """With the optimizer's state whole, and shared out (ZeRO-1)."""
    case: dict[str, Any] = {
        "settings": [*settings_of(updates), *SETTINGS[1:]],
        "artifact": str(updates.artifact.path),
        "accumulation": 2,
        "clip": 0.05,
        "bucket_bytes": 1,
    }
    job = run_job({name: case | {"shards": name == "zero-1"} for name in ("whole", "zero-1")}, 2, tmp_path)

    model = updates.model()
    twin = EagerProgram(model, precision=updates.plan.precision)
    rows = updates.plan.spec.batch_size * 4
    for step in range(1, STEPS + 1):
        batch = whole_batch(updates.plan, rows, step)
        expected = twin.train_step([batch], table(updates.plan, model, step), 0.05)
        for worker in (*job["whole"], *job["zero-1"]):
            assert worker["losses"][step - 1].item() == pytest.approx(expected.loss.item(), rel=1e-10)
            assert worker["norms"][step - 1].item() == pytest.approx(expected.grad_norm.item(), rel=1e-10)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for worker in (*job["whole"], *job["zero-1"]):
        assert all(distance(worker["weights"][name], weight) <= 1e-8 for name, weight in weights.items())
    for name, holders in (("whole", 2), ("zero-1", 1)):
        held = [key for worker in job[name] for key in worker["state"]]
        assert len(held) == len(set(held)) * holders
