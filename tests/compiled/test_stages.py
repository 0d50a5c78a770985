"""How the compile room sees a model: slots by two names, pure calls, and which blocks are alike."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import modelzoo
from apps.training.step_plan import StepPlan
from backends import load
from backends.layers import BackendLinear
from compiled.stages import Slot, canonical_names, make_stage, slots, structure

PlanOf = Callable[..., StepPlan]


def test_a_stage_knows_each_parameter_by_its_own_and_the_models_name(plan_of: PlanOf) -> None:
    model = plan_of().model
    stage = make_stage(model, "model.layers.1")
    assert Slot("mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight") in stage.parameters
    assert [slot.local for slot in stage.parameters] == [name for name, _ in stage.module.named_parameters()]
    paths = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
    assert {slot.full for path in paths for slot in make_stage(model, path).parameters} == {
        name for name, _ in model.named_parameters()
    }


def test_a_tied_weight_has_one_name(plan_of: PlanOf) -> None:
    model = plan_of(tie_word_embeddings=True).model
    assert make_stage(model, "lm_head").parameters == [Slot("weight", "model.embed_tokens.weight")]
    assert len(canonical_names(model)) == len(list(model.named_parameters()))


def test_a_frozen_parameter_is_not_trained(plan_of: PlanOf) -> None:
    model = plan_of().model
    model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    stage = make_stage(model, "model.layers.0")
    untrained = {slot.local for slot in stage.parameters} - {slot.local for slot in stage.trained_parameters()}
    assert untrained == {"mlp.up_proj.weight"}
    assert "mlp.up_proj.weight" not in slots(stage)["trained"]
    assert "mlp.up_proj.weight" in slots(stage)["parameters"]


def test_state_buffers_are_slots_of_the_stage(plan_of: PlanOf) -> None:
    rule = "backend.rules=[{match: '*.mlp.up_proj', use: 'tests.backends.stateful_backend:ScaledBackend'}]"
    stage = make_stage(plan_of(rule).model, "model.layers.0")
    assert slots(stage)["state"] == {
        f"mlp.up_proj.{name}": f"model.layers.0.mlp.up_proj.{name}" for name in ("max_abs", "step")
    }


def test_a_call_is_pure_and_returns_the_new_state() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BackendLinear(4, 3)
            self.layer.set_backend(load("tests.backends.stateful_backend:ScaledBackend", levels=16))

    holder = Holder()
    stage = make_stage(holder, "layer")  # type: ignore[arg-type]
    given = {"weight": torch.ones(3, 4), "bias": torch.zeros(3), "max_abs": torch.tensor(0.5), "step": torch.tensor(7)}
    output, state = stage.call(given, torch.full((2, 4), 2.0))
    assert torch.equal(output, torch.full((2, 3), 8.0))
    assert {name: value.item() for name, value in state.items()} == {"max_abs": 2.0, "step": 8}
    assert given["step"].item() == 7
    assert holder.layer.get_buffer("step").item() == 0


def test_equal_blocks_have_one_structure(plan_of: PlanOf) -> None:
    layers = plan_of(num_hidden_layers=5).model.model.layers
    assert len({structure(layer) for layer in layers}) == 1
    assert structure(layers[0]) == structure(copy.deepcopy(layers[0]))


def freeze(layer: nn.Module) -> None:
    layer.mlp.up_proj.weight.requires_grad_(False)  # type: ignore[union-attr]


def change_epsilon(layer: nn.Module) -> None:
    layer.input_layernorm.variance_epsilon = 0.5  # type: ignore[union-attr]


def change_backend(layer: nn.Module) -> None:
    layer.mlp.up_proj.set_backend(load("tests.backends.stateful_backend:ScaledBackend"))  # type: ignore[operator,union-attr]


def change_activation(layer: nn.Module) -> None:
    layer.mlp.act_fn = torch.nn.functional.relu  # type: ignore[union-attr]


def change_shape(layer: nn.Module) -> None:
    layer.mlp.up_proj = BackendLinear(32, 64, bias=False, device="meta")  # type: ignore[union-attr]


def change_dtype(layer: nn.Module) -> None:
    layer.double()


def stop_training(layer: nn.Module) -> None:
    layer.eval()


@pytest.mark.parametrize(
    "change",
    [freeze, change_epsilon, change_backend, change_activation, change_shape, change_dtype, stop_training],
)
def test_whatever_changes_the_graph_changes_the_structure(plan_of: PlanOf, change: Callable[[Any], None]) -> None:
    first, second = plan_of().model.model.layers
    before = structure(second)
    change(second)
    assert structure(second) != before
    assert structure(first) == before


def test_two_options_of_one_backend_are_two_structures() -> None:
    layers = [BackendLinear(4, 4), BackendLinear(4, 4), BackendLinear(4, 4)]
    for layer, levels in zip(layers, (16, 32, 16), strict=True):
        layer.set_backend(load("tests.backends.stateful_backend:ScaledBackend", levels=levels))
    first, second, third = map(structure, layers)
    assert first != second
    assert first == third


def test_weights_are_not_part_of_the_structure(tiny_config: Callable[..., Any]) -> None:
    model = modelzoo.build_model(modelzoo.load_config(config_name=tiny_config()), dtype="float32", seed=1)
    first, second = model.model.layers
    assert not torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)
    assert structure(first) == structure(second)
