"""Muon and Mango through the artifact: the published formulas over whole runs, a resume, workers that share blocks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backends.errors import UserError
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.step_worker import STEPS as WORKER_STEPS
from tests.compiled.step_worker import run_job, share, table, whole_batch
from tests.compiled.test_many_workers import settings_of

STEPS, PEAK = 50, 0.02
SETTINGS = {
    "muon": ["optimizer=muon", f"optimizer.lr={PEAK}", "optimizer.weight_decay=0.1", "optimizer.adamw_lr=1e-3"],
    "mango": ["optimizer=mango", f"optimizer.lr={PEAK}", "optimizer.head_lr=0.003", "optimizer.vec_w_lr=0.001"],
}


@pytest.fixture(scope="module", params=SETTINGS)
def compiled(request: pytest.FixtureRequest, compile_step: Compile) -> tuple[str, Compiled]:
    return request.param, compile_step("model.dtype=float64", *SETTINGS[request.param])


def orthogonal(matrix: np.ndarray, rounds: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (np.linalg.norm(values) + 1e-7)
    for _ in range(rounds):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])) * (left * values) @ right


class Muon:
    """One parameter by Jordan's formula, or by AdamW where it is no matrix of a block."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.hidden = "layers" in name and value.ndim == 2
        self.value, self.a, self.b = value, np.zeros_like(value), np.zeros_like(value)

    def step(self, number: int, gradient: np.ndarray, share: float) -> None:
        if self.hidden:
            self.a = 0.95 * self.a + gradient
            self.value = self.value * (1 - share * PEAK * 0.1)
            self.value = self.value - share * PEAK * orthogonal(gradient + 0.95 * self.a, 5)
            return
        self.a = 0.95 * self.a + 0.05 * gradient
        self.b = 0.95 * self.b + 0.05 * gradient**2
        bias = 1 - 0.95**number
        self.value = self.value - share * 1e-3 * (self.a / bias) / (np.sqrt(self.b / bias) + 1e-8)


class Mango:
    """One parameter by the published order: precondition, momentum, norm of its kind, rate of its kind, offset."""

    def __init__(self, name: str, value: np.ndarray) -> None:
        self.name, self.value = name, value
        self.v, self.m, self.o = np.zeros_like(value), np.zeros_like(value), np.zeros_like(value)

    def step(self, number: int, gradient: np.ndarray, share: float) -> None:
        self.v = 0.95 * self.v + gradient**2
        scaled = gradient / (np.sqrt(self.v) + 1e-8)
        self.m = 0.95 * self.m + scaled
        ahead, rate = scaled + 0.95 * self.m, PEAK
        if self.value.ndim == 1:
            direction, rate = np.sign(ahead), 0.001
        elif "embed" in self.name:
            direction = ahead / (np.linalg.norm(ahead, axis=1, keepdims=True) + 1e-8)
        else:
            direction, rate = orthogonal(ahead, 6), 0.003 if "lm_head" in self.name else PEAK
        moved = -share * rate * direction
        self.o = 0.99 * self.o + 0.01 * moved
        self.value = self.value + moved + self.o


FORMULAS: Mapping[str, Any] = {"muon": Muon, "mango": Mango}


def numbers(compiled: Compiled, model: Any, step: int) -> Tensor:
    """The table for a rate that falls to nothing."""
    return compiled.hyperparameters(model, step, lr=PEAK * share_of(step))


def share_of(step: int) -> float:
    return 1 - (step - 1) / STEPS


@pytest.mark.slow
def test_fifty_steps_through_the_artifact_equal_the_formula_in_fp64(compiled: tuple[str, Compiled]) -> None:
    name, step = compiled
    model = step.model()
    program = step.program(model)
    theirs = {key: FORMULAS[name](key, value.detach().numpy().copy()) for key, value in model.named_parameters()}
    for number in range(1, STEPS + 1):
        batch = step.batch(number)
        gradients = {key: value.clone() for key, value in program.gradients([batch]).items()}
        program.train_step([batch], numbers(step, model, number), None)
        for key, parameter in model.named_parameters():
            theirs[key].step(number, gradients[key].numpy(), share_of(number))
            assert np.abs(parameter.detach().numpy() - theirs[key].value).max() <= 1e-10, (key, number)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_same_bits(compiled: tuple[str, Compiled]) -> None:
    _, step = compiled
    models = [step.model(), step.model(seed=2)]
    programs = [step.program(model) for model in models]
    for number in (1, 2, 3):
        programs[0].train_step([step.batch(number)], numbers(step, models[0], number), 1.0)
    models[1].load_state_dict(models[0].state_dict())
    programs[1].load_optimizer_state({key: value.clone() for key, value in programs[0].optimizer_state().items()})
    for number in (4, 5):
        for program, model in zip(programs, models, strict=True):
            program.train_step([step.batch(number)], numbers(step, model, number), 1.0)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_two_workers_that_share_the_blocks_out_equal_one(compiled: tuple[str, Compiled], tmp_path: Path) -> None:
    """ZeRO-1: a block's products are computed by one worker, from the whole of each matrix."""
    name, step = compiled
    case = {
        "settings": [*settings_of(step), *SETTINGS[name]],
        "artifact": str(step.artifact.path),
        "accumulation": 1,
        "clip": 0.3,
        "shards": True,
        "bucket_bytes": 1,
    }
    found = run_job({"case": case}, 2, tmp_path)["case"]

    model = step.model()
    program, rows = step.program(model, stats_every=1), 2 * step.plan.spec.batch_size  # as the workers'
    for number in range(1, WORKER_STEPS + 1):
        program.measuring.begin(number)
        program.train_step(share(whole_batch(step.plan, rows, number), 0, 1, 2), table(step.plan, model, number), 0.3)
    for key, weight in model.named_parameters():
        assert torch.equal(found[0]["weights"][key], found[1]["weights"][key])
        assert (found[0]["weights"][key] - weight.detach()).norm() <= 1e-9 * weight.detach().norm(), key
    held = [set(each["state"]) for each in found]
    assert held[0].isdisjoint(held[1])
    assert held[0] | held[1] == set(program.optimizer_state())
    for each in found:  # both have a block, whole
        momenta = {key: value for key, value in each["state"].items() if key.endswith("up_proj.weight.momentum")}
        assert [tuple(value.shape) for value in momenta.values()] == [(48, 32)]


def test_rounds_belong_to_the_artifact_and_rates_do_not(plan_of: Any) -> None:
    plain, faster = plan_of("optimizer=muon"), plan_of("optimizer=muon", "optimizer.lr=0.3", "optimizer.momentum=0.5")
    assert plain.spec.key == faster.spec.key
    assert plain.spec.key != plan_of("optimizer=muon", "optimizer.ns_steps=6").spec.key
    with pytest.raises(UserError, match="ns_steps"):
        plan_of("optimizer=mango", "optimizer.ns_steps=0")
