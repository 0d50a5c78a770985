"""Steps whose float32 masters are stored as the bits that bfloat16 parameters lack, against steps with whole ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.eager_program import EagerProgram
from backends.split_masters import REST, join
from tests.compiled.conftest import Compile, Compiled

BFLOAT16 = ("model.dtype=bfloat16", "compile.head_chunks=1")


@pytest.fixture(scope="module")
def steps(compile_step: Compile) -> dict[str, Compiled]:
    return {
        kind: compile_step(*BFLOAT16, f"optimizer.master_weights={kind}", num_hidden_layers=1)
        for kind in ("split", "float32")
    }


def masters(program: Any, model: Any) -> dict[str, Tensor]:
    state, weights = program.optimizer_state(), dict(model.named_parameters())
    if any(key.endswith(".master") for key in state):
        return {name: state[f"{name}.master"].clone() for name in weights}
    return {name: join(weight.detach(), state[f"{name}.{REST}"]) for name, weight in weights.items()}


def train(step: Compiled, program: Any, model: Any, steps: range) -> list[float]:
    return [
        float(program.train_step([step.batch(number)], step.hyperparameters(model, number), None).loss)
        for number in steps
    ]


def test_a_step_gives_the_same_masters_to_the_last_bit(steps: dict[str, Compiled]) -> None:
    found = {}
    for kind, step in steps.items():
        model = step.model()
        program = step.program(model)
        train(step, program, model, range(1, 2))
        found[kind] = masters(program, model)
        assert {
            str(each.dtype) for key, each in program.optimizer_state().items() if key.endswith((REST, "master"))
        } == {"torch.int16" if kind == "split" else "torch.float32"}
    for name, master in found["float32"].items():
        assert torch.equal(found["split"][name], master), name
    assert any(master.to(torch.bfloat16).float().ne(master).any() for master in found["split"].values())


def test_training_follows_whole_masters_and_the_eager_twin(steps: dict[str, Compiled]) -> None:
    losses = {}
    for kind, step in steps.items():
        model = step.model()
        losses[kind] = train(step, step.program(model), model, range(1, 9))
    step = steps["split"]
    model = step.model()
    twin = EagerProgram(model, precision=step.plan.precision, groups=step.plan.groups)
    losses["twin"] = train(step, twin, model, range(1, 9))
    assert losses["split"] == pytest.approx(losses["float32"], rel=2e-3)
    assert losses["twin"] == pytest.approx(losses["split"], rel=5e-3)


def test_a_resumed_run_is_the_run(steps: dict[str, Compiled]) -> None:
    step = steps["split"]
    models = [step.model(), step.model()]
    programs = [step.program(model) for model in models]
    train(step, programs[0], models[0], range(1, 4))
    models[1].load_state_dict(models[0].state_dict())
    programs[1].load_optimizer_state({k: v.clone() for k, v in programs[0].optimizer_state().items()})
    for program, model in zip(programs, models, strict=True):
        train(step, program, model, range(4, 6))
    for one, other in zip(*(masters(*pair).values() for pair in zip(programs, models, strict=True)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("source", "target"), [("split", "float32"), ("float32", "split")])
def test_masters_of_one_kind_are_taken_over_as_the_other(steps: dict[str, Compiled], source: str, target: str) -> None:
    models = {kind: step.model() for kind, step in steps.items()}
    programs = {kind: step.program(models[kind]) for kind, step in steps.items()}
    train(steps[source], programs[source], models[source], range(1, 4))
    models[target].load_state_dict(models[source].state_dict())
    state = {key: each.clone() for key, each in programs[source].optimizer_state().items()}
    programs[target].load_optimizer_state(state)
    expected, found = (masters(programs[kind], models[kind]) for kind in (source, target))
    for name, master in expected.items():
        assert torch.equal(found[name], master), name


def test_statistics_are_of_the_masters(steps: dict[str, Compiled]) -> None:
    tables = {}
    for kind, step in steps.items():
        model = step.model()
        program = step.program(model, stats_every=1)
        for number in (1, 2):
            program.measuring.begin(number)
            train(step, program, model, range(number, number + 1))
        tables[kind] = program.measuring.table.clone()
    torch.testing.assert_close(tables["split"], tables["float32"], rtol=1e-4, atol=1e-6)
