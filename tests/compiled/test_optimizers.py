"""One artifact in which every optimizer updates some parameters: against others' implementations, the eager twin, a
resume, and two workers that share the state out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from tests.apps.training.optimizers.references import Reference, decoupled, optaxs, torchs
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.step_worker import run_job
from tests.compiled.test_many_workers import settings_of

# pattern → optimizer, settings, and the same in another's words
ROUTES: list[tuple[str, str, dict[str, Any], Any]] = [
    ("*q_proj*", "adam", {"weight_decay": 0.2}, torchs(torch.optim.Adam, betas=(0.9, 0.999), weight_decay=0.2)),
    (
        "*k_proj*",
        "nadam",
        {"weight_decay": 0.0},
        optaxs("nadam", b1=0.9, b2=0.999, eps=1e-8),
    ),
    (
        "*v_proj*",
        "rmsprop",
        {"weight_decay": 0.1},
        decoupled(optaxs("rmsprop", decay=0.99, eps=1e-8, eps_in_sqrt=False, bias_correction=True), 0.1),
    ),
    ("*o_proj*", "sgdm", {"nesterov": True}, torchs(torch.optim.SGD, momentum=0.9, nesterov=True)),
    ("*up_proj*", "lion", {"weight_decay": 0.3}, optaxs("lion", b1=0.9, b2=0.99, weight_decay=0.3)),
    ("*down_proj*", "adafactor", {}, torchs(torch.optim.Adafactor, eps=(1e-7, 1e-3))),
    ("*input_layernorm*", "adafactor", {"lr": 3e-3}, torchs(torch.optim.Adafactor, eps=(1e-7, 1e-3))),
    (
        "*post_attention*",
        "adamw",
        {"weight_decay": 0.5},  # given for the norm itself, it decays
        torchs(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.5),
    ),
    ("*norm*", "adamw", {}, torchs(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.0)),
    ("*lm_head*", "adamw", {"lr": 2e-3}, torchs(torch.optim.AdamW, betas=(0.9, 0.999), weight_decay=0.1)),
]
NORMALIZED = ["model.embed_tokens.weight", "model.layers.0.mlp.gate_proj.weight"]  # one norm for both
GROUPS = [{"match": match, "optimizer": name, **settings} for match, name, settings, _ in ROUTES]
SETTINGS = ("optimizer=normalized_sgdm", "optimizer.normalize=global", f"optimizer.groups={json.dumps(GROUPS)}")


@pytest.fixture(scope="module")
def mixed(compile_step: Compile) -> Compiled:
    return compile_step("model.dtype=float64", *SETTINGS, num_hidden_layers=1)


def rate_at(step: int, peak: float) -> float:
    return peak / step**0.5


def globally_normalized(start: dict[str, Tensor]) -> Any:
    """Normalized SGD with momentum over several tensors as one vector, written out."""
    total = {name: torch.zeros_like(value) for name, value in start.items()}
    value = dict(start)

    def step(gradients: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
        ahead = {}
        for name in value:
            total[name] = 0.95 * total[name] + gradients[name]
            ahead[name] = 0.95 * total[name] + gradients[name]
        length = torch.cat([each.flatten() for each in ahead.values()]).norm()
        for name in value:
            value[name] = value[name] - rate * ahead[name] / length
        return value

    return step


def test_fifty_steps_of_every_optimizer_in_one_artifact(mixed: Compiled) -> None:
    model = mixed.model()
    program, twin = (
        mixed.program(model),
        EagerProgram(theirs := mixed.model(), precision=mixed.plan.precision, groups=mixed.plan.groups),
    )
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    peaks = {name: group.settings.lr for group in mixed.plan.groups for name in group.shapes}
    references: dict[str, Reference] = {}
    for name, value in start.items():
        routes = [route for route in ROUTES if route[0].strip("*") in name]
        if routes:
            references[name] = routes[0][3](value)
    assert sorted(start.keys() - references.keys()) == NORMALIZED
    together = globally_normalized({name: start[name] for name in NORMALIZED})
    for step in range(1, 51):
        parts = [mixed.batch(step)]
        gradients = {name: each.clone() for name, each in program.gradients(parts).items()}
        table = mixed.table(model, step, lambda peak, step=step: rate_at(step, peak))
        program.train_step(parts, table, None)
        twin.train_step(parts, table, None)
        expected = {name: rule(gradients[name], rate_at(step, peaks[name])) for name, rule in references.items()}
        expected |= together(gradients, rate_at(step, 0.05))
        for name, value in model.named_parameters():
            assert (value - expected[name]).abs().max() <= 1e-10, (step, name)
    for name, value in theirs.named_parameters():
        assert (value - dict(model.named_parameters())[name]).abs().max() <= 1e-9, name


def test_the_state_has_the_shapes_that_the_rules_say(mixed: Compiled) -> None:
    state = mixed.program(mixed.model()).optimizer_state()
    layer = "model.layers.0"
    assert state[f"{layer}.mlp.down_proj.weight.exp_avg_sq_row"].shape == (32,)
    assert state[f"{layer}.mlp.down_proj.weight.exp_avg_sq_col"].shape == (48,)
    assert state[f"{layer}.input_layernorm.weight.exp_avg_sq"].shape == (32,)
    assert [key for key in state if "embed_tokens" in key] == ["model.embed_tokens.weight.momentum"]
    assert mixed.artifact.manifest["optimizer"]["state_elements"] == sum(each.numel() for each in state.values())


def test_a_resumed_run_ends_with_the_same_bits(mixed: Compiled) -> None:
    model = mixed.model()
    program = mixed.program(model)
    resumed, second = None, None
    for step in range(1, 7):
        if step == 4:
            resumed = mixed.model(seed=9)
            second = mixed.program(resumed)
            resumed.load_state_dict(model.state_dict())
            second.load_optimizer_state({key: each.clone() for key, each in program.optimizer_state().items()})
        for each, trained in ((program, model), (second, resumed)):
            if each is not None:
                each.train_step([mixed.batch(step)], mixed.hyperparameters(trained, step), 1.0)
    assert resumed is not None
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def case_of(compiled: Compiled, *settings: str, accumulation: int = 1, shards: bool = False) -> dict[str, Any]:
    return {
        "settings": [*settings_of(compiled), *settings],
        "artifact": str(compiled.artifact.path),
        "accumulation": accumulation,
        "clip": 0.3,
        "shards": shards,
        "bucket_bytes": 2**20,
    }


@pytest.mark.slow
def test_two_workers_that_share_whole_parameters_out_equal_one(mixed: Compiled, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    alone = run_job({"alone": case_of(mixed, *SETTINGS, accumulation=2)}, 1, folders[0])["alone"][0]
    found = run_job(
        {"whole": case_of(mixed, *SETTINGS), "shared": case_of(mixed, *SETTINGS, shards=True)}, 2, folders[1]
    )
    for name, workers in found.items():
        for worker in workers:
            for key, value in worker["weights"].items():
                assert (value - alone["weights"][key]).abs().max() <= 1e-10, (name, key)
    shares = [worker["state"] for worker in found["shared"]]
    assert not shares[0].keys() & shares[1].keys()
    assert shares[0].keys() | shares[1].keys() == alone["state"].keys()


@pytest.fixture(scope="module")
def stochastic(compile_step: Compile) -> Compiled:
    return compile_step("model.dtype=bfloat16", "optimizer.master_weights=stochastic", num_hidden_layers=1)


def test_stochastic_rounding_moves_weights_that_rounding_to_the_nearest_leaves(stochastic: Compiled) -> None:
    """At a rate far below bfloat16's spacing a few weights move, the mean of all moves is the float32 update's, and
    the eager twin rounds the same ones."""
    model, theirs = stochastic.model(), stochastic.model()
    program = stochastic.program(model)
    twin = EagerProgram(theirs, precision=stochastic.plan.precision, groups=stochastic.plan.groups)
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    gradients = program.gradients([stochastic.batch(1)])
    table = stochastic.hyperparameters(model, 1, lr=1e-4)
    program.train_step([stochastic.batch(1)], table, None)
    twin.train_step([stochastic.batch(1)], table, None)
    moved = {name: (each - start[name]).float() for name, each in model.named_parameters()}
    share = sum(int(each.count_nonzero()) for each in moved.values()) / sum(each.numel() for each in moved.values())
    assert 0.05 < share < 0.9
    name = "model.layers.0.mlp.gate_proj.weight"
    wanted = -1e-4 * (gradients[name].float().sign() + 0.1 * start[name].float())  # AdamW's first step
    noise = moved[name] - wanted
    assert noise.mean().abs() < 5 * noise.std() / noise.numel() ** 0.5
    projection = (moved[name] * wanted).sum() / wanted.square().sum()
    assert 0.9 < projection < 1.1
    differing = sum(int((a != b).sum()) for a, b in zip(model.parameters(), theirs.parameters(), strict=True))
    assert differing <= 0.02 * sum(each.numel() for each in model.parameters())
    assert not [key for key in program.optimizer_state() if key.endswith(".master")]


def test_stochastic_rounding_resumes_exactly_and_another_seed_rounds_otherwise(stochastic: Compiled) -> None:
    models = [stochastic.model() for _ in range(2)]
    programs = [stochastic.program(model) for model in models]
    for step in (1, 2):
        programs[0].train_step([stochastic.batch(step)], stochastic.hyperparameters(models[0], step), None)
    models[1].load_state_dict(models[0].state_dict())
    programs[1].load_optimizer_state({k: v.clone() for k, v in programs[0].optimizer_state().items()})
    for model, program in zip(models, programs, strict=True):
        program.train_step([stochastic.batch(3)], stochastic.hyperparameters(model, 3), None)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_stochastic_rounding_is_the_same_in_whichever_worker_a_parameter_lies(
    stochastic: Compiled, tmp_path: Path
) -> None:
    given = ("optimizer.master_weights=stochastic",)
    cases = {"whole": case_of(stochastic, *given), "shared": case_of(stochastic, *given, shards=True)}
    found = run_job(cases, 2, tmp_path)
    for key, value in found["whole"][0]["weights"].items():
        for worker in (found["whole"][1], *found["shared"]):
            assert torch.equal(worker["weights"][key], value), key
