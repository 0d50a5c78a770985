"""Weights that regions take together: the same training, the same parameters, the same checkpoints."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from apps.training.eager_program import EagerProgram
from apps.training.step_plan import StepPlan
from compiled.joining import join, lay_together
from compiled.schedule import capture_step
from compiled.stages import make_stage
from modelzoo.checkpoint_writing import save_model
from tests.compiled.conftest import Compiled
from tests.compiled.interpreted import InterpretedArtifact

PlanOf = Callable[..., StepPlan]
QKV = [f"self_attn.{name}_proj.weight" for name in "qkv"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up")]


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr("compiled.schedule.JOINS", ("cpu",))


def joint_of(plan: StepPlan, number: int = 0) -> dict[str, list[str]]:
    stage = make_stage(plan.model, f"model.layers.{number}")
    join(stage, plan.model)
    return stage.joint


@pytest.fixture
def biased(joins: None, plan_of: PlanOf) -> Compiled:
    """Grouped heads, biases, and two chunks of the head, in float64: rounding cannot hide a wrong row."""
    plan = plan_of("model.dtype=float64", attention_bias=True, mlp_bias=True)
    return Compiled(plan, InterpretedArtifact(plan), [])  # type: ignore[arg-type]


def test_regions_take_and_give_what_is_joint_and_updates_what_is_not(biased: Compiled) -> None:
    captured = biased.artifact.captured  # type: ignore[attr-defined]
    names = {region: {spec.name for spec in each.spec.inputs} for region, each in captured.items()}
    alone = {*QKV, *MLP, *(name.replace("weight", "bias") for name in (*QKV, *MLP))}
    joint = {f"{module}.joint_{kind}" for module in ("self_attn", "mlp") for kind in ("weight", "bias")}
    assert joint <= names["block_0_forward"]
    assert not alone & (names["block_0_forward"] | names["block_0_backward"])
    assert {f"grad_{name}" for name in joint} <= {spec.name for spec in captured["block_0_backward"].spec.outputs}
    assert alone <= names["update_0"]
    products = [str(node.target) for node in captured["block_0_forward"].graph.graph.nodes]
    assert sum("mm" in target and "bmm" not in target for target in products) == 4  # qkv, o, gate and up, down


def test_training_follows_the_eager_twin(biased: Compiled) -> None:
    ours = biased.model()
    theirs, before = copy.deepcopy(ours), dict(ours.named_parameters())
    program, twin = biased.program(ours), EagerProgram(theirs, precision=biased.plan.precision)
    for step in range(1, 4):
        batches = [biased.batch(10 * step + index, 0.8, of=40) for index in range(1 + step % 2)]
        hyper = biased.hyperparameters(ours, step)
        result, expected = program.train_step(batches, hyper, 0.5), twin.train_step(batches, hyper, 0.5)
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-10, atol=0)
    after = dict(ours.named_parameters())
    assert list(after) == list(before)
    for (name, mine), other in zip(after.items(), theirs.parameters(), strict=True):
        assert mine is before[name]
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


def test_low_rank_layers_share_the_product_with_what_they_read(joins: None, plan_of: PlanOf) -> None:
    rules = [{"match": "*_proj", "use": "lowrank", "keep": 0.5, "bias": True}]
    plan = plan_of("model.dtype=float64", f"backend.rules={json.dumps(rules)}")
    low = Compiled(plan, InterpretedArtifact(plan), rules)  # type: ignore[arg-type]
    joint = {"self_attn.joint_weight": [f"self_attn.{name}_proj.weight_in" for name in "qkv"]}
    assert joint_of(plan) == joint | {"mlp.joint_weight": [f"mlp.{name}_proj.weight_in" for name in ("gate", "up")]}
    products = [str(node.target) for node in low.artifact.captured["block_0_forward"].graph.graph.nodes]  # type: ignore[attr-defined]
    assert sum("mm" in target and "bmm" not in target for target in products) == 4 + 7  # W_in of the four, seven W_out
    test_training_follows_the_eager_twin(low)


def test_gradients_by_name_are_those_of_separate_products(
    biased: Compiled, plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiled.schedule.JOINS", ())
    apart = Compiled(biased.plan, InterpretedArtifact(biased.plan), [])  # type: ignore[arg-type]
    found = [step.program(step.model()).gradients([step.batch(1), step.batch(2)]) for step in (biased, apart)]
    assert found[0].keys() == found[1].keys() == dict(biased.model().named_parameters()).keys()
    for name, gradient in found[0].items():
        assert gradient.is_contiguous()
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-10, atol=1e-12)


def test_a_second_program_finds_the_memory_as_the_first_one_left_it(biased: Compiled) -> None:
    model = biased.model()
    values = {name: each.detach().clone() for name, each in model.named_parameters()}
    first, second = biased.program(model), biased.program(model)
    q, k, v = (getattr(model.model.layers[1].self_attn, f"{name}_proj").weight for name in "qkv")
    joint = first.binding.joint["model.layers.1.self_attn.q_proj.weight"]
    assert joint.data_ptr() == second.binding.joint["model.layers.1.self_attn.q_proj.weight"].data_ptr() == q.data_ptr()
    assert joint.untyped_storage().nbytes() == q.nbytes + k.nbytes + v.nbytes
    assert torch.equal(joint, torch.cat([q, k, v]))
    assert all(torch.equal(each, values[name]) for name, each in model.named_parameters())


def test_a_checkpoint_holds_each_parameter_once(biased: Compiled, tmp_path: Path) -> None:
    model = biased.model()
    biased.program(model)
    for save in (save_model, lambda model, folder: model.save_pretrained(folder)):
        folder = tmp_path / str(save)
        save(model, folder)
        total = sum(each.nbytes for each in model.parameters())
        assert total < (folder / "model.safetensors").stat().st_size < total + 20_000
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for (name, ours), (other, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(ours, theirs)


def test_memory_side_by_side_by_chance_is_not_taken_for_one() -> None:
    """Two allocations may touch; a view across both would be a use of memory that nobody holds."""
    entry = {"joint": {"joint_weight": ["a", "b"]}, "parameters": {"a": "a", "b": "b"}}
    whole = torch.arange(12.0).view(6, 2)
    parts = {"a": nn.Parameter(whole[2:4]), "b": nn.Parameter(whole[:2])}  # touching, in the other order
    joint = lay_together([entry], parts)["a"]
    assert torch.equal(joint, torch.cat([whole[2:4], whole[:2]]))
    parts["b"].data.add_(1)
    assert torch.equal(joint[2:], parts["b"])


def tie(model: Any) -> None:
    model.model.layers[1].self_attn.v_proj.weight = model.model.layers[0].self_attn.v_proj.weight


def freeze(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.requires_grad_(False)


def test_what_may_not_be_joint_is_left_alone(plan_of: PlanOf) -> None:
    both = {"self_attn.joint_weight": QKV, "mlp.joint_weight": MLP}
    assert joint_of(plan_of()) == both
    optical = plan_of("backend.rules=[{match: '*.0.*k_proj', use: optical}]")
    assert joint_of(optical) == {"mlp.joint_weight": MLP}
    assert joint_of(optical, 1) == both
    assert joint_of(plan_of("lora.r=2", "lora.match=[up_proj]")) == {"self_attn.joint_weight": QKV}
    for change, rest in ((tie, {"mlp.joint_weight": MLP}), (freeze, {"self_attn.joint_weight": QKV})):
        plan = plan_of()
        change(plan.model)
        assert joint_of(plan) == rest
    # a bias of 6 bfloat16 numbers ends where no GPU kernel may begin
    assert joint_of(plan_of("model.dtype=bfloat16", intermediate_size=6, mlp_bias=True)) == {
        "self_attn.joint_weight": QKV
    }


def test_blocks_that_join_differently_have_regions_of_their_own(joins: None, plan_of: PlanOf) -> None:
    plan = plan_of(num_hidden_layers=3)
    tie(plan.model)
    _, schedule = capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)
    assert [block["forward"] for block in schedule.blocks] == ["block_0_forward", "block_0_forward", "block_1_forward"]
    assert "self_attn.joint_weight" not in schedule.blocks[1]["joint"]


def test_modules_for_other_compilers_take_every_parameter_by_itself(joins: None, plan_of: PlanOf) -> None:
    plan = plan_of("compile.target=mlir")
    regions, schedule = capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)
    assert {*QKV, *MLP} <= {spec.name for spec in regions["block_0_forward"].spec.inputs}
    assert all(entry["joint"] == {} for entry in (schedule.embed, *schedule.blocks, schedule.head))


def test_frozen_weights_are_joint_and_have_no_gradient(joins: None, plan_of: PlanOf) -> None:
    plan = plan_of("model.dtype=float64")
    for block in plan.model.model.layers:
        block.mlp.gate_proj.requires_grad_(False)
        block.mlp.up_proj.requires_grad_(False)
    step = Compiled(plan, InterpretedArtifact(plan), [])  # type: ignore[arg-type]
    gradients = step.program(step.model()).gradients([step.batch(1)])
    assert "model.layers.0.mlp.down_proj.weight" in gradients
    assert not any("gate_proj" in name or "up_proj" in name for name in gradients)
