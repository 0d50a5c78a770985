"""Which parameters are updated together, and in which dtype their gradients come."""

from collections.abc import Callable
from typing import Any

import torch

from apps.training.step_plan import StepPlan
from compiled import lowering
from compiled.capture import Captured, Sources
from compiled.capture_parts import head_stage
from compiled.groups import add_updates, block_group, embed_group, head_group, lookup_rows
from compiled.stages import make_stage

PlanOf = Callable[..., StepPlan]


def updates(plan: StepPlan, chunks: int = 1, pairs: bool = False) -> tuple[dict[str, Captured], list[dict[str, Any]]]:
    regions: dict[str, Captured] = {}
    blocks = [make_stage(plan.model, path) for path in plan.model.stages().blocks]
    embed, head = make_stage(plan.model, plan.model.stages().embed), head_stage(plan.model)
    sources = Sources(lowering.fake_mode(), torch.device("cpu"))
    optimizers = plan.optimizers
    entries = add_updates(regions, blocks, embed, head, chunks, optimizers, plan.precision, sources, pairs=pairs)
    return regions, entries


def gradient_dtypes(captured: Captured) -> set[str]:
    return {spec.dtype for spec in captured.spec.inputs if spec.name.startswith("grad_") and spec.name != "grad_coef"}


def test_equal_blocks_share_one_update_and_every_parameter_is_updated_once(plan_of: PlanOf) -> None:
    plan = plan_of(num_hidden_layers=4)
    regions, entries = updates(plan)
    assert list(regions) == ["update_0", "update_head", "update_embed"]
    assert [entry["direct"] for entry in entries] == ["update_0"] * 4 + ["update_head", "update_embed"]
    updated = [name for entry in entries for name in entry["parameters"].values()]
    assert sorted(updated) == sorted(name for name, _ in plan.model.named_parameters())


def test_float32_gradients_need_no_second_region(plan_of: PlanOf) -> None:
    regions, entries = updates(plan_of("model.dtype=float32"))
    assert all(entry["direct"] == entry["summed"] for entry in entries)
    assert gradient_dtypes(regions["update_0"]) == {"float32"}


def test_bfloat16_gradients_come_direct_or_summed_in_float32(plan_of: PlanOf) -> None:
    regions, entries = updates(plan_of("model.dtype=bfloat16"))
    assert [(entry["direct"], entry["summed"]) for entry in entries] == [
        ("update_0", "update_0_summed"),
        ("update_0", "update_0_summed"),
        ("update_head", "update_head_summed"),
        ("update_embed", "update_embed_summed"),
    ]
    assert gradient_dtypes(regions["update_0"]) == {"bfloat16"}
    assert gradient_dtypes(regions["update_0_summed"]) == {"float32"}


def test_gradients_of_two_workers_are_added_by_a_region_of_their_own(plan_of: PlanOf) -> None:
    regions, entries = updates(plan_of("model.dtype=bfloat16"), pairs=True)
    assert [entry["paired"] for entry in entries] == ["update_0_paired"] * 2 + [
        "update_head_paired",
        "update_embed_paired",
    ]
    assert gradient_dtypes(regions["update_0_paired"]) == {"bfloat16"}
    names = [spec.name for spec in regions["update_0_paired"].spec.inputs]
    assert sum(name.startswith("addend_") for name in names) == len(entries[0]["parameters"])
    regions, entries = updates(plan_of("model.dtype=bfloat16"))
    assert not any("paired" in entry for entry in entries)


def test_a_tied_weight_is_the_embeddings_where_its_two_gradients_are_summed(plan_of: PlanOf) -> None:
    plan = plan_of("model.dtype=bfloat16", tie_word_embeddings=True)
    embed, head = make_stage(plan.model, "model.embed_tokens"), head_stage(plan.model)
    group = embed_group(embed, head)
    assert group.direct == group.summed == {"model.embed_tokens.weight": torch.float32}
    assert group.shapes == {"model.embed_tokens.weight": (96, 32)}
    assert head_group(embed, head, chunks=1).direct == {"model.norm.weight": torch.bfloat16}
    assert lookup_rows(embed, head) is None


def test_several_head_chunks_sum_the_heads_gradients_and_not_the_embeddings(plan_of: PlanOf) -> None:
    plan = plan_of("model.dtype=bfloat16")
    embed, head = make_stage(plan.model, "model.embed_tokens"), head_stage(plan.model)
    assert head_group(embed, head, chunks=4).direct == {
        "model.norm.weight": torch.float32,
        "lm_head.weight": torch.float32,
    }
    assert embed_group(embed, head).direct == {"model.embed_tokens.weight": torch.bfloat16}
    assert lookup_rows(embed, head) == 96


def test_frozen_parameters_are_in_no_group(plan_of: PlanOf) -> None:
    plan = plan_of(num_hidden_layers=3)
    frozen = plan.model.model.layers[1]
    frozen.requires_grad_(False)
    plan.model.model.layers[2].mlp.requires_grad_(False)
    assert block_group(make_stage(plan.model, "model.layers.1")).shapes == {}
    regions, entries = updates(plan)
    assert [entry["direct"] for entry in entries] == ["update_0", None, "update_2", "update_head", "update_embed"]
    assert entries[1]["parameters"] == {}
    assert not any(".mlp." in spec.name for spec in regions["update_2"].spec.inputs)
