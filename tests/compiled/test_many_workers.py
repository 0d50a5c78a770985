"""A step over several processes through the artifact against plain autograd on the whole batch in one."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from compiled.measuring import COLUMNS
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.step_worker import STEPS, run_job, table, whole_batch

# Statistics that the whole batch decides, and noise that a row's place in it decides.
STATEFUL = ({"match": "*_proj", "use": "tests.backends.delayed_backend:DelayedBackend"},)
CASES = {
    f"{dtype}-{accumulation}{'-sharded' if shards else ''}{'-stateful' if rules else ''}-{clip}": (
        (dtype, accumulation, shards, clip, rules)
    )
    for dtype, accumulation, shards, clip, rules in (
        ("float64", 1, False, None, ()),
        ("float64", 4, False, 0.3, ()),
        ("float64", 1, True, 0.3, ()),
        ("float64", 4, True, None, ()),
        ("float32", 1, False, 0.3, ()),
        ("float32", 4, False, None, ()),
        ("float32", 1, True, None, ()),
        ("float64", 1, True, None, STATEFUL),
        ("float64", 4, False, 0.3, STATEFUL),
    )
}
GRADIENTS = {"float64": 1e-12, "float32": 1e-5}
LOSSES = {"float64": 1e-10, "float32": 1e-6}

Results = dict[str, list[dict[str, Any]]]  # by case: what each worker found


@pytest.fixture(scope="module", params=[1, 2, 4])
def job(request: pytest.FixtureRequest, compile_step: Compile, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs every case with that many workers."""
    world_size, folder = request.param, tmp_path_factory.mktemp("job")
    cases = {}
    for name, (dtype, accumulation, shards, clip, rules) in CASES.items():
        compiled = compile_step(f"model.dtype={dtype}", rules=rules)
        cases[name] = {
            "settings": settings_of(compiled),
            "artifact": str(compiled.artifact.path),
            "accumulation": accumulation,
            "clip": clip,
            "shards": shards,
            "bucket_bytes": 1 if accumulation == 1 else 2**20,  # a group at a time, or all together
        }
    return world_size, run_job(cases, world_size, folder)


def settings_of(compiled: Compiled) -> list[str]:
    """A command line for the same step."""
    config = compiled.artifact.path.with_suffix(".config")
    config.mkdir(exist_ok=True)
    (config / "config.json").write_text(json.dumps(compiled.plan.model_config.to_dict() | {"model_type": "llama"}))
    spec = compiled.plan.spec
    return [
        "command=run",
        f"checkpoint.config_name={config}",
        f"model.dtype={compiled.plan.precision.parameters}",
        f"training.batch_size={spec.batch_size}",
        f"model.max_seq_length={spec.max_seq_length}",
        "compile.arch=cpu",
        f"backend.rules={json.dumps(compiled.rules)}",
    ]


def in_one_process(compiled: Compiled, rows: int, clip: float | None) -> tuple[dict[str, Tensor], list[Any], Any]:
    """Gradients of step 0, results of the steps and the model, by plain autograd on whole batches."""
    model = compiled.model()
    twin = EagerProgram(model, precision=compiled.plan.precision, stats_every=1)
    gradients = twin.gradients([whole_batch(compiled.plan, rows, 0)])
    steps = []
    for step in range(1, STEPS + 1):
        twin.measuring.begin(step)
        result = twin.train_step([whole_batch(compiled.plan, rows, step)], table(compiled.plan, model, step), clip)
        steps.append((result, twin.measuring.table.clone(), twin.measuring.accuracy.item()))
    return gradients, steps, model


def assert_same_statistics(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Norms within the tolerance, inner products within it of the lengths of their sides."""
    column = COLUMNS.index
    scale = theirs.abs()
    for last in ("last_grad", "last_update"):
        sides = theirs[:, column("grad_square")] * theirs[:, column(f"{last}_square")]
        scale[:, column(f"dot_{last}")] = sides.sqrt()
    # a step after the first is as far off as the weights; Adam's update of a gradient that is all rounding is rounding
    off = (ours - theirs).abs() > 1000 * tolerance * scale.clamp_min(1e-30)
    assert not off.any(), [(row, COLUMNS[place]) for row, place in off.nonzero().tolist()]


def distance(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


@pytest.mark.slow
def test_workers_together_equal_one_process(job: tuple[int, Results], compile_step: Compile) -> None:
    world_size, results = job
    for name, (dtype, accumulation, _, clip, rules) in CASES.items():
        compiled = compile_step(f"model.dtype={dtype}", rules=rules)
        rows = compiled.plan.spec.batch_size * world_size * accumulation
        gradients, steps, model = in_one_process(compiled, rows, clip)
        found: dict[str, Tensor] = {}
        for worker in results[name]:
            for key, gradient in worker["gradients"].items():
                assert distance(gradient, gradients[key]) <= GRADIENTS[dtype], (name, key)
            found |= worker["gradients"]
            for index, (expected, statistics, accuracy) in enumerate(steps):
                loss, norm = worker["losses"][index], worker["norms"][index]
                assert_same_statistics(worker["statistics"][index], statistics, LOSSES[dtype])
                assert worker["accuracies"][index].item() == pytest.approx(accuracy, rel=1e-6)
                assert loss.item() == pytest.approx(expected.loss.item(), rel=LOSSES[dtype])
                if clip is not None:
                    assert norm.item() == pytest.approx(expected.grad_norm.item(), rel=LOSSES[dtype])
            for key, weight in model.named_parameters():
                assert distance(worker["weights"][key], weight) <= 100 * LOSSES[dtype], (name, key)
            for key, buffer in model.named_buffers():
                if not key.endswith("first_row"):
                    torch.testing.assert_close(worker["buffers"][key], buffer, rtol=1e-6, atol=1e-7, msg=key)
        assert found.keys() == gradients.keys()


@pytest.mark.slow
def test_all_workers_have_the_same_weights_bit_for_bit(job: tuple[int, Results]) -> None:
    for first, *others in job[1].values():
        for other in others:
            assert all(torch.equal(first["weights"][key], other["weights"][key]) for key in first["weights"])


@pytest.mark.slow
def test_sharded_optimizer_state_lies_on_one_worker_each(job: tuple[int, Results]) -> None:
    world_size, results = job
    for name, (_, _, shards, _, _) in CASES.items():
        held = [key for worker in results[name] for key in worker["state"]]
        assert len(held) == len(set(held)) * (1 if shards else world_size)
        if shards and world_size <= 2:  # two blocks, head, embedding: four groups
            assert all(worker["state"] for worker in results[name])
