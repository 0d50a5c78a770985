"""The compiled step over low-rank layers: regions of two thin products, the eager twin, workers."""

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

RULES = ({"match": "*.k_proj", "use": "lowrank", "rank": 3, "bias": True}, {"match": "*_proj", "use": "lowrank"})
SETTINGS = ("model.dtype=float64", "compile.head_chunks=4")
PlanOf = Callable[..., StepPlan]


def captured(plan: StepPlan) -> tuple[dict[str, Captured], Schedule]:
    return capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)


def test_blocks_take_the_factors_and_multiply_by_them_alone(plan_of: PlanOf) -> None:
    regions, schedule = captured(plan_of("backend.rules=[{match: '*_proj', use: lowrank, keep: 0.5}]"))
    trained = schedule.blocks[0]["trained"]
    assert sum(name.endswith("weight_in") for name in trained) == 7
    assert not any(name.endswith("_proj.weight") for name in trained)
    assert {block["forward"] for block in schedule.blocks} == {"block_0_forward"}
    dense, _ = captured(plan_of())
    products, rest = [], []
    for each in (dense["block_0_forward"].spec, regions["block_0_forward"].spec):
        shapes = [spec.shape for spec in each.inputs if "_proj." in spec.name]
        products.append(sum(2 * 32 * rows * columns for rows, columns in shapes))  # 32 tokens
        rest.append(each.flops - products[-1])
    assert rest[0] == rest[1] > 0  # attention's products
    assert 0.4 * products[0] < products[1] <= 0.5 * products[0]


def test_rank_and_bias_are_part_of_the_step(plan_of: PlanOf) -> None:
    variants = [
        plan_of(f"backend.rules=[{{match: '*.q_proj', use: {rule}}}]").spec.key
        for rule in ("dense", "lowrank, rank: 4", "lowrank, rank: 5", "lowrank, rank: 4, bias: true")
    ]
    assert len(set(variants)) == len(variants)


@pytest.fixture(scope="module")
def thin(compile_step: Compile) -> Compiled:
    return compile_step(*SETTINGS, rules=RULES)


@pytest.mark.slow
@pytest.mark.parametrize(("clip", "microbatches"), [(None, 1), (0.05, 3)])
def test_training_equals_the_eager_twin(thin: Compiled, clip: float | None, microbatches: int) -> None:
    ours, theirs = thin.model(), thin.model()
    program, twin = thin.program(ours), EagerProgram(theirs, precision=thin.plan.precision)
    before = {name: each.detach().clone() for name, each in ours.named_parameters()}
    for step in range(1, 5):
        batches = [thin.batch(10 * step + index, 0.7, of=20) for index in range(microbatches)]
        hyper = thin.hyperparameters(ours, step)
        result, expected = program.train_step(batches, hyper, clip), twin.train_step(batches, hyper, clip)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-10)
        if clip is not None:
            assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-10)
    for (name, mine), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert distance(mine, other) <= 1e-8, name
        assert not torch.equal(mine, before[name]), name
    assert program.evaluate(batches[0]).item() == pytest.approx(twin.evaluate(batches[0]).item(), rel=1e-10)


@pytest.mark.slow
def test_two_workers_equal_one(thin: Compiled, tmp_path: Path) -> None:
    """With the optimizer's state whole, and shared out (ZeRO-1)."""
    case: dict[str, Any] = {
        "settings": [*settings_of(thin), *SETTINGS[1:]],
        "artifact": str(thin.artifact.path),
        "accumulation": 2,
        "clip": 0.05,
        "bucket_bytes": 1,
    }
    job = run_job({name: case | {"shards": name == "zero-1"} for name in ("whole", "zero-1")}, 2, tmp_path)

    model = thin.model()
    twin = EagerProgram(model, precision=thin.plan.precision)
    for step in range(1, STEPS + 1):
        batch = whole_batch(thin.plan, thin.plan.spec.batch_size * 4, step)
        expected = twin.train_step([batch], table(thin.plan, model, step), 0.05)
        for worker in (*job["whole"], *job["zero-1"]):
            assert worker["losses"][step - 1].item() == pytest.approx(expected.loss.item(), rel=1e-10)
            assert worker["norms"][step - 1].item() == pytest.approx(expected.grad_norm.item(), rel=1e-10)
    weights: dict[str, Tensor] = dict(model.named_parameters())
    for worker in (*job["whole"], *job["zero-1"]):
        assert all(distance(worker["weights"][name], weight) <= 1e-8 for name, weight in weights.items())
