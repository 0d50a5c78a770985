"""Tracing: each distinct part once, without weights, whatever the depth."""

from collections.abc import Callable

import pytest

from apps.training.step_plan import StepPlan, plan_step
from compiled.build import step_cost
from compiled.schedule import capture_step

PlanOf = Callable[..., StepPlan]


def traced(plan: StepPlan):
    return capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)


def test_equal_blocks_share_their_regions_whatever_the_depth(plan_of: PlanOf) -> None:
    shallow, _ = traced(plan_of(num_hidden_layers=2))
    deep, schedule = traced(plan_of(num_hidden_layers=40))
    assert shallow.keys() == deep.keys()
    assert [region.identity for region in shallow.values()] == [region.identity for region in deep.values()]
    assert len(schedule.blocks) == 40
    names = schedule.blocks[39]["parameters"]
    assert names["self_attn.q_proj.weight"] == "model.layers.39.self_attn.q_proj.weight"


def test_layers_routed_differently_get_regions_of_their_own(plan_of: PlanOf) -> None:
    rule = "{match: 'model.layers.1.mlp.*', use: 'tests.backends.stateful_backend:ScaledBackend'}"
    regions, schedule = traced(plan_of(f"backend.rules=[{rule}]", num_hidden_layers=3))
    forwards = [block["forward"] for block in schedule.blocks]
    assert forwards == ["block_0_forward", "block_1_forward", "block_0_forward"]
    assert schedule.blocks[1]["evaluate"] == "block_1_evaluate_forward"
    assert schedule.blocks[0]["evaluate"] == "block_0_forward"
    assert not schedule.blocks[0]["state"]
    assert schedule.blocks[1]["state"]
    assert {"block_0_forward", "block_1_forward", "block_1_evaluate_forward"} <= regions.keys()


@pytest.mark.parametrize(
    ("backend", "evaluate"),
    [("training_backend:RoundsInTraining", "block_0_evaluate_forward"), ("two_sum_backend:TwoSum", "block_0_forward")],
)
def test_a_backend_without_state_is_evaluated_as_it_computes_in_evaluation(
    plan_of: PlanOf, backend: str, evaluate: str
) -> None:
    """It is told whether it trains. Where that makes no difference the forward serves both."""
    plan = plan_of(f"backend.rules=[{{match: '*.mlp.*', use: 'tests.backends.{backend}'}}]")
    regions, schedule = traced(plan)
    assert {block["evaluate"] for block in schedule.blocks} == {evaluate}
    assert "round" not in regions[evaluate].graph.code
    assert ("block_0_evaluate_forward" in regions) == (evaluate != "block_0_forward")


def test_parts_that_trace_to_one_graph_share_it_though_their_structure_differs(plan_of: PlanOf) -> None:
    plan = plan_of(num_hidden_layers=2)
    plan.model.get_submodule("model.layers.1").note = "a setting that no operator reads"
    regions, schedule = traced(plan)
    assert schedule.blocks[0]["forward"] == schedule.blocks[1]["forward"]
    assert "block_1_forward" not in regions


def test_a_tied_weight_is_updated_once(plan_of: PlanOf) -> None:
    _, schedule = traced(plan_of(tie_word_embeddings=True))
    *_, head, embed = (list(update["parameters"]) for update in schedule.updates)
    assert (head, embed) == (["model.norm.weight"], ["model.embed_tokens.weight"])
    assert schedule.embed["lookup_rows"] is None  # the projection's gradient has no zero rows
    assert schedule.head["parameters"]["head.weight"] == "model.embed_tokens.weight"


def test_activations_are_saved_and_weights_are_not(plan_of: PlanOf) -> None:
    regions, _ = traced(plan_of("training.batch_size=5"))  # 80 tokens: no activation has a weight's shape
    saved = {spec.shape for spec in regions["block_0_forward"].spec.outputs if spec.name.startswith("saved_")}
    assert (80, 48) in saved
    weights = {spec.shape for spec in regions["block_0_forward"].spec.inputs if spec.name.endswith("weight")}
    assert not saved & (weights | {shape[::-1] for shape in weights})
    taken = {spec.name for spec in regions["block_0_backward"].spec.inputs}
    assert {"self_attn.q_proj.weight", "mlp.down_proj.weight"} <= taken


def test_a_frozen_embedding_has_no_backward_and_no_update(plan_of: PlanOf) -> None:
    plan = plan_of()
    plan.model.get_submodule("model.embed_tokens").weight.requires_grad_(False)
    regions, schedule = traced(plan)
    assert schedule.embed["backward"] is None
    assert schedule.embed["trained"] == []
    assert "embed_backward" not in regions
    assert schedule.updates[-1]["parameters"] == {}
    assert schedule.embed["lookup_rows"] is None
    costs = {name: region.spec for name, region in regions.items()}
    assert step_cost(costs, schedule, plan.spec)["flops"] > 0


@pytest.mark.slow
def test_seventy_billion_parameters_are_traced_without_weights() -> None:
    import resource

    from apps.training.config import parse

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shape = ["model.max_seq_length=4096", "training.batch_size=1", "model.dtype=bfloat16", "compile.arch=cpu"]
    regions, schedule = traced(plan_step(parse(["command=compile", "checkpoint.config_name=llama-2-70b", *shape])))
    assert len(schedule.blocks) == 80
    assert regions["block_0_forward"].spec.flops > 1e12
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30
