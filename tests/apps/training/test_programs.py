"""What runs the step: which artifact is taken, what is said when there is none, and the memory it will need."""

import dataclasses
import math
import shlex
from pathlib import Path

import pytest

from apps.training import programs
from apps.training.config import parse
from apps.training.config_schema import TrainConfig
from apps.training.eager_program import EagerProgram
from apps.training.models import load_weights
from apps.training.programs import FILLED, make_program, require_artifact, run_memory
from apps.training.step_plan import StepPlan, plan_step
from apps.training.workers.group import Workers
from backends.errors import UserError
from compiled.artifact import Artifact, Nearest
from compiled.spec import FieldDifference


@pytest.fixture
def config(settings: dict[str, str], tmp_path: Path) -> TrainConfig:
    changed = settings | {"compile.target": "inductor", "compile.output_dir": str(tmp_path / "artifacts")}
    return parse([f"{key}={value}" for key, value in changed.items()])


@pytest.fixture
def plan(config: TrainConfig) -> StepPlan:
    return plan_step(config)


def eager(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, compile=dataclasses.replace(config.compile, target="eager"))


def test_the_eager_twin_needs_no_artifact_and_updates_the_model_it_is_given(
    config: TrainConfig, plan: StepPlan
) -> None:
    import torch

    model = load_weights(config, plan.model_config, torch.device("cpu"))
    assert require_artifact(eager(config), plan) is None
    program = make_program(eager(config), plan, None, model, Workers.solo())
    assert isinstance(program, EagerProgram)
    assert program.model is model


def test_the_eager_twin_is_not_replayed_as_a_graph(config: TrainConfig, plan: StepPlan) -> None:
    asked = dataclasses.replace(eager(config), run=dataclasses.replace(config.run, cuda_graph="on"))
    with pytest.raises(UserError, match=r"cuda_graph=on needs a compiled step, got compile.target=eager. Use .*=auto"):
        require_artifact(asked, plan)


def test_without_an_artifact_the_error_is_a_command_that_can_be_pasted(config: TrainConfig, plan: StepPlan) -> None:
    with pytest.raises(UserError, match="There is no artifact in") as error:
        require_artifact(config, plan)
    pasted = shlex.split(str(error.value).partition("Compile one: ")[2])
    assert pasted[:2] == ["python", "apps/train_llm.py"]
    assert plan_step(parse(pasted[2:])).spec == plan.spec


def test_the_nearest_artifact_is_shown_with_the_fields_that_differ(
    config: TrainConfig, plan: StepPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearest = Nearest(Artifact(Path("near.substrate"), {}), [FieldDifference("batch_size", 8, 4)])
    monkeypatch.setattr(programs, "find", lambda folder, spec: nearest)
    with pytest.raises(UserError) as error:
        require_artifact(config, plan)
    first, *table = str(error.value).splitlines()
    assert "near.substrate" in first
    assert "Compile one: python apps/train_llm.py command=compile" in first
    assert table[-1].split() == ["batch_size", "|", "8", "|", "4"]


def test_memory_counts_the_activations_the_artifact_tells_of(config: TrainConfig, plan: StepPlan) -> None:
    parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    cost = {"hidden_bytes": 10, "saved_bytes": [100, 300, 200], "head_bytes": 24}
    state: dict[str, object] = {"state_elements": 2 * parameters, "totals": []}
    artifact = Artifact(
        Path("a.substrate"),
        {
            "cost": cost,
            "optimizer": state,
            "parameters": parameters,
            "trained_parameters": parameters,
            "teacher_bytes": 0,
        },
    )
    needed = run_memory(config, plan, artifact, accumulation=1, world_size=1, free=10**12)
    assert needed.activations == 4 * 10 + 600 + 24
    assert needed.recomputed == 0
    assert needed.parameters == needed.gradients == 4 * parameters
    assert needed.moments == 8 * parameters
    assert run_memory(eager(config), plan, None, accumulation=1, world_size=1, free=0).activations > 0

    def chosen(recompute: str, free: int) -> tuple[int, int]:
        asked = dataclasses.replace(config, run=dataclasses.replace(config.run, recompute=recompute))
        found = run_memory(asked, plan, artifact, accumulation=1, world_size=1, free=free)
        return found.recomputed, found.activations - 4 * 10 - 24

    names = [name for name, _ in plan.model.named_parameters()]
    ends = {"a": names[0], "b": names[-1]}
    largest = sum(plan.model.get_parameter(name).numel() for name in ends.values())
    artifact.manifest["schedule"] = {"updates": [{"parameters": ends}, {"parameters": {"a": names[1]}}]}
    unclipped = dataclasses.replace(config, training=dataclasses.replace(config.training, max_grad_norm=None))
    found = run_memory(unclipped, plan, artifact, accumulation=1, world_size=1, free=10**12)
    assert found.gradients == pytest.approx(2 * 4 * largest, abs=4)
    state["totals"] = [["every", "total"]]  # of a rule that sums over all groups before it updates any
    assert (
        run_memory(unclipped, plan, artifact, accumulation=1, world_size=1, free=10**12).gradients == needed.gradients
    )
    state["totals"] = []

    # bfloat16 gradients of two microbatches are added by the update, of more, or where somebody looks at them, before
    half = dataclasses.replace(plan, precision=dataclasses.replace(plan.precision, parameters="bfloat16"))

    def gradients(accumulation: int, world_size: int = 1, asked: TrainConfig = unclipped) -> int:
        found = run_memory(asked, half, artifact, accumulation=accumulation, world_size=world_size, free=10**12)
        return found.gradients // parameters

    for update in artifact.manifest["schedule"]["updates"]:
        update |= {"direct": "a", "paired": "b"}
    assert [gradients(2), gradients(3), gradients(2, 2), gradients(2, asked=config)] == [2, 4, 4, 4]
    artifact.manifest["schedule"]["updates"][0].pop("paired")
    assert gradients(2) == 4

    rest = needed.total - 600
    assert chosen("none", 0) == (0, 600)
    assert chosen("block", 10**12) == (3, 300)
    fits = {600: (0, 600), 599: (2, 500), 499: (3, 300), 0: (3, 300)}  # one recomputed block alone would save nothing
    for room, expected in fits.items():
        assert chosen("auto", math.ceil((rest + room) / FILLED)) == expected
