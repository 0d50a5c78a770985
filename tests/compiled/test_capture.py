"""Captured forward and backward graphs, run by the interpreter on real tensors, against autograd on the module."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.training.step_plan import StepPlan
from backends import load, route
from backends.articles import article_spans
from backends.kernels import article_attention, in_capture
from backends.layers import BackendLinear
from compiled import lowering
from compiled.capture import Captured, Sources, capture_function, capture_stage
from compiled.stages import Stage, make_stage
from tests.backends.kernels.interpreter import needs_triton
from tests.compiled.interpreted import assert_close, random_inputs, random_tensor, run

PlanOf = Callable[..., StepPlan]
DTYPE = torch.float64


def sources() -> Sources:
    return Sources(lowering.fake_mode(), torch.device("cpu"))


def capture_block(
    plan: StepPlan, with_articles: bool = False, dtype: torch.dtype = DTYPE
) -> tuple[Stage, Captured, Captured]:
    """The first block of the plan's model, on [2, 16] tokens."""
    made, stage = sources(), make_stage(plan.model, "model.layers.0")
    head_dim, hidden = plan.model_config.head_dim, plan.model_config.hidden_size
    activations = {
        "hidden_states": made.empty((2, 16, hidden), dtype, requires_grad=True),
        "cos": made.empty((16, head_dim), dtype),
        "sin": made.empty((16, head_dim), dtype),
    }
    if with_articles:
        activations["articles"] = made.empty((2, 2, 16), torch.int32)
    with lowering.quiet_torch():
        return stage, *capture_stage("block", stage, activations, made)


def autograd(
    stage: Stage, tensors: dict[str, Tensor], leaves: list[str], grad_output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the module itself, by plain autograd."""
    named = {name: tensor.clone().requires_grad_(name in leaves) for name, tensor in tensors.items()}
    local = {slot.local for slot in (*stage.parameters, *stage.state)}
    inputs = [tensor for name, tensor in named.items() if name not in local]
    output, _ = stage.call({name: tensor for name, tensor in named.items() if name in local}, *inputs)
    gradients = torch.autograd.grad(output, [named[name] for name in leaves], grad_output)
    return output.detach(), {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def assert_captured_equals_autograd(stage: Stage, forward: Captured, backward: Captured, leaves: list[str]) -> None:
    tensors = random_inputs(forward)
    if "articles" in tensors:
        tensors["articles"] = article_spans(torch.tensor([[1] * 5 + [2] * 8 + [0] * 3, [1] * 16]))
    grad_output = random_tensor(forward.spec.outputs[0], seed=99)
    outputs = run(forward, tensors)
    gradients = run(backward, tensors | outputs | {"grad_output": grad_output})
    expected_output, expected = autograd(stage, tensors, leaves, grad_output)
    assert_close({"output": outputs["output"]}, {"output": expected_output})
    assert_close(gradients, expected)


@pytest.mark.parametrize(
    ("fields", "with_articles"),
    [
        ({}, False),
        ({"attention_bias": True, "mlp_bias": True}, False),
        ({"num_key_value_heads": 4, "hidden_act": "gelu"}, True),
    ],
    ids=["grouped-heads", "biased", "articles"],
)
def test_a_block_equals_autograd(plan_of: PlanOf, fields: dict[str, Any], with_articles: bool) -> None:
    stage, forward, backward = capture_block(plan_of("model.dtype=float64", **fields), with_articles)
    leaves = [*(slot.local for slot in stage.parameters), "hidden_states"]
    assert_captured_equals_autograd(stage, forward, backward, leaves)


@pytest.mark.parametrize("rules", [[], [{"match": "*.self_attn", "use": "optical"}]], ids=["dense", "optical"])
def test_no_mask_crosses_from_forward_to_backward(plan_of: PlanOf, rules: list[dict[str, Any]]) -> None:
    """The backward makes it again of the articles' spans: kept, it would be [B, S, S] a block."""
    plan = plan_of()
    route(plan.model, rules)
    _, forward, backward = capture_block(plan, with_articles=True, dtype=torch.float32)
    masks = [(16, 16), (2, 16, 16), (2, 1, 16, 16)]
    assert not [each.name for each in (*forward.spec.outputs, *backward.spec.inputs) if each.shape in masks]
    assert "articles" in [each.name for each in backward.spec.inputs]


@needs_triton
def test_a_block_traced_for_a_gpu_attends_inside_articles_by_kernels(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(article_attention, "takes_kernels", lambda _: bool(in_capture._captures))
    plan = plan_of("model.dtype=bfloat16", hidden_size=256)  # heads of 64 channels
    _, forward, backward = capture_block(plan, with_articles=True, dtype=torch.bfloat16)
    for region in (forward, backward):
        names = [str(node.target) for node in region.graph.graph.nodes if node.op == "call_function"]
        part = region.spec.name.removeprefix("block_")
        assert [name for name in names if "attention" in name] == [f"substrate.article_attention_{part}.default"]
        values = [node.meta["val"] for node in region.graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        assert not [value for value in values if value.shape[-2:] == (16, 16)]


def test_frozen_parameters_get_no_gradient_and_the_others_keep_theirs(plan_of: PlanOf) -> None:
    plan = plan_of("model.dtype=float64", attention_bias=True)
    block = plan.model.model.layers[0]
    for name, parameter in block.named_parameters():  # as with adapters: only the query's weights and a bias learn
        parameter.requires_grad_(name in ("self_attn.q_proj.weight", "self_attn.v_proj.bias"))
    stage, forward, backward = capture_block(plan)
    leaves = ["self_attn.q_proj.weight", "self_attn.v_proj.bias", "hidden_states"]
    assert [spec.name for spec in backward.spec.outputs] == [f"grad_{name}" for name in leaves]
    assert_captured_equals_autograd(stage, forward, backward, leaves)


def test_a_wholly_frozen_block_still_passes_the_gradient_down(plan_of: PlanOf) -> None:
    plan = plan_of("model.dtype=float64")
    plan.model.model.layers[0].requires_grad_(False)
    stage, forward, backward = capture_block(plan)
    assert_captured_equals_autograd(stage, forward, backward, ["hidden_states"])


def test_the_embedding_equals_autograd_with_ids_that_repeat(plan_of: PlanOf) -> None:
    made, stage = sources(), make_stage(plan_of("model.dtype=float64").model, "model.embed_tokens")
    ids = {"input_ids": made.empty((2, 16), torch.int64)}
    forward, backward = capture_stage("embed", stage, ids, made)
    tensors = {"weight": torch.randn(96, 32, dtype=DTYPE), "input_ids": torch.arange(32).view(2, 16) % 5}
    grad_output = torch.randn(2, 16, 32, dtype=DTYPE)
    outputs = run(forward, tensors)
    assert torch.equal(outputs["output"], tensors["weight"][tensors["input_ids"]])
    gradient = run(backward, tensors | outputs | {"grad_output": grad_output})["grad_weight"]
    expected = torch.zeros(96, 32, dtype=DTYPE).index_add(0, tensors["input_ids"].flatten(), grad_output.view(32, 32))
    assert_close({"weight": gradient}, {"weight": expected})


class SharedInput(nn.Module):
    """A layer whose input is its residual too, and whose weight is used twice, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BackendLinear(8, 8, device="meta", dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.tanh(x)) @ self.layer.weight * x


def capture_module(module: nn.Module) -> tuple[Stage, Captured, Captured]:
    holder, made = nn.ModuleDict({"part": module}), sources()
    stage = make_stage(holder, "part")  # type: ignore[arg-type]
    hidden = {"hidden_states": made.empty((4, 8), DTYPE, requires_grad=True)}
    return stage, *capture_stage("part", stage, hidden, made)


def test_inputs_and_weights_used_several_times_equal_autograd() -> None:
    stage, forward, backward = capture_module(SharedInput())
    assert_captured_equals_autograd(stage, forward, backward, ["layer.weight", "layer.bias", "hidden_states"])


def test_only_true_activations_are_saved(plan_of: PlanOf) -> None:
    """Weights, tables and the block's input lie in memory anyway: the backward takes them from there, by name."""
    # 32 tokens: no activation has a weight's shape
    plan = plan_of("model.dtype=float64", hidden_size=24, intermediate_size=40)
    stage, forward, backward = capture_block(plan)
    crossing = {spec.name for spec in backward.spec.inputs} - {"grad_output"}
    inputs = {spec.name for spec in forward.spec.inputs}
    saved = [spec for spec in forward.spec.outputs if spec.name != "output"]
    assert {spec.name for spec in saved} == crossing - inputs - {"output"}
    assert {"mlp.up_proj.weight", "hidden_states", "cos"} <= crossing
    weights = {tuple(parameter.shape) for parameter in stage.trained_parameters().values() if parameter.ndim == 2}
    assert not weights & {spec.shape for spec in saved}
    assert [spec.name for spec in saved] == [f"saved_{i}" for i in range(len(saved))]


def test_state_leaves_the_forward_by_name() -> None:
    layer = BackendLinear(8, 8, device="meta", dtype=DTYPE)
    layer.set_backend(load("tests.backends.stateful_backend:ScaledBackend", levels=16))
    _, forward, backward = capture_module(layer)
    tensors = random_inputs(forward) | {"max_abs": torch.tensor(0.25), "step": torch.tensor(3)}
    outputs = run(forward, tensors)
    assert outputs["new_step"].item() == 4
    assert outputs["new_max_abs"].item() == pytest.approx(float(tensors["hidden_states"].abs().max()))
    assert not any(spec.name.startswith("grad_new") for spec in backward.spec.inputs)
    grad_output = torch.randn(4, 8, dtype=DTYPE)
    gradients = run(backward, tensors | outputs | {"grad_output": grad_output})
    # straight-through: the gradient of the plain product
    expected = {"grad_weight": grad_output.t() @ tensors["hidden_states"], "grad_bias": grad_output.sum(0)}
    assert_close(gradients, expected | {"grad_hidden_states": grad_output @ tensors["weight"]})


def test_state_that_an_evaluating_layer_hands_on_is_a_copy() -> None:
    layer = BackendLinear(8, 8, device="meta", dtype=DTYPE).eval()
    layer.set_backend(load("tests.backends.stateful_backend:ScaledBackend"))
    _, forward, _ = capture_module(layer)
    tensors = random_inputs(forward)
    outputs = run(forward, tensors)
    assert torch.equal(outputs["new_max_abs"], tensors["max_abs"])
    assert outputs["new_max_abs"].data_ptr() != tensors["max_abs"].data_ptr()


def test_a_function_may_write_its_inputs_and_says_which() -> None:
    made = sources()

    def add(x: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        total.copy_(total + x.sum())
        return (x * 2,)

    inputs = {"x": made.empty((3,), DTYPE), "total": made.empty((), DTYPE)}
    captured = capture_function("add", add, inputs, ["doubled"], mutated=["total"])
    tensors = {"x": torch.tensor([1.0, 2.0, 3.0], dtype=DTYPE), "total": torch.tensor(10.0, dtype=DTYPE)}
    assert run(captured, tensors)["doubled"].tolist() == [2.0, 4.0, 6.0]
    assert tensors["total"].item() == 16.0
    assert captured.spec.mutated == ["total"]


def test_equal_parts_have_one_identity_whatever_they_are_called(plan_of: PlanOf) -> None:
    first, second = (capture_block(plan_of("model.dtype=float64")) for _ in range(2))
    other = capture_block(plan_of("model.dtype=float64", rms_norm_eps=1e-3))
    assert [captured.identity for captured in first[1:]] == [captured.identity for captured in second[1:]]
    assert first[1].identity != other[1].identity
    first[1].spec.name = "renamed"
    assert first[1].identity == second[1].identity


def test_a_baked_in_table_is_part_of_the_identity() -> None:
    class Table(nn.Module):
        def __init__(self, first: float) -> None:
            super().__init__()
            self.layer = BackendLinear(8, 8, device="meta", dtype=DTYPE)
            self.table = [first, *range(7)]

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * torch.tensor(self.table, dtype=DTYPE)

    with lowering.quiet_torch():
        one, same, other = (capture_module(Table(first)) for first in (0.5, 0.5, 0.25))
    assert one[1].graph.code == other[1].graph.code  # the code alone does not tell
    assert one[1].identity == same[1].identity
    assert one[1].identity != other[1].identity
    assert one[2].identity != other[2].identity
