"""Which parameter is updated by what: patterns, the first match, decay, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from apps.training.config import parse
from apps.training.optimizers.adamw import AdamW
from apps.training.optimizers.sgdm import SGDM
from apps.training.parameter_groups import ParameterGroup, group_parameters, groups_table, roles_of
from backends.errors import UserError
from tests.apps.training.test_eager_program import tiny_llama

PARAMETERS: dict[str, Any] = {
    "model.embed_tokens.weight": ((9, 4), "embedding"),
    "model.layers.0.self_attn.q_proj.weight": ((4, 4), "matrix"),
    "model.layers.0.self_attn.q_proj.bias": ((4,), "vector"),
    "model.layers.0.input_layernorm.weight": ((4,), "vector"),
    "lm_head.weight": ((9, 4), "head"),
}


def groups_of(groups: list[dict[str, Any]], *settings: str) -> list[ParameterGroup]:
    config = parse(["command=run", f"optimizer.groups={json.dumps(groups)}", *settings])
    return group_parameters(config.optimizer, PARAMETERS)


def found(groups: list[ParameterGroup]) -> dict[str, ParameterGroup]:
    return {name: group for group in groups for name in group.shapes}


def test_without_groups_norms_and_biases_alone_are_spared_from_decay() -> None:
    groups = found(groups_of([], "optimizer.weight_decay=0.3"))
    assert {name: group.numbers(1, 1.0)["weight_decay"] for name, group in groups.items()} == {
        name: 0.0 if role == "vector" else 0.3 for name, (_, role) in PARAMETERS.items()
    }
    assert all(type(group.rule) is AdamW for group in groups.values())


def test_the_first_match_wins_and_what_is_not_said_is_the_runs_own() -> None:
    groups = found(
        groups_of(
            [{"match": "*bias", "lr": 0.5}, {"match": "*self_attn*", "lr": 0.25}, {"match": "*q_pro?.w*", "lr": 9}][:2],
            "optimizer.beta1=0.7",
        )
    )
    assert groups["model.layers.0.self_attn.q_proj.bias"].settings.lr == 0.5
    assert groups["model.layers.0.self_attn.q_proj.weight"].settings.lr == 0.25
    assert groups["lm_head.weight"].settings.lr == AdamW.Config().lr
    assert {group.settings.beta1 for group in groups.values()} == {0.7}


def test_another_optimizer_has_its_own_defaults_and_the_runs_own_keeps_the_runs() -> None:
    given = [
        {"match": "lm_head*", "optimizer": "sgdm", "momentum": 0.8},
        {"match": "*embed*", "optimizer": "adamw", "lr": 3e-4},
    ]
    groups = found(groups_of(given, "optimizer.beta2=0.9"))
    assert type(groups["lm_head.weight"].rule) is SGDM
    assert groups["lm_head.weight"].settings == SGDM.Config(momentum=0.8)
    assert groups["model.embed_tokens.weight"].settings == AdamW.Config(lr=3e-4, beta2=0.9)


def test_decay_that_a_pattern_is_given_holds_for_norms_too() -> None:
    groups = found(groups_of([{"match": "*norm*", "weight_decay": 0.2}]))
    assert groups["model.layers.0.input_layernorm.weight"].numbers(1, 1.0)["weight_decay"] == 0.2
    assert groups["model.layers.0.self_attn.q_proj.bias"].numbers(1, 1.0)["weight_decay"] == 0.0


def test_the_table_shows_rate_decay_and_counts() -> None:
    table = groups_table(groups_of([{"match": "*norm*", "weight_decay": 0, "lr": 0.002}]))
    head, norm, *rest = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    assert head[:4] == ["group", "optimizer", "lr", "weight_decay"]
    assert norm == ["*norm*", "adamw", "0.002", "0", "1", "4", "model.layers.0.input_layernorm.weight"]
    assert [row[4:6] for row in rest] == [["3", "88"], ["1", "4"]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "*nrom*", "lr": 1}], r"'\*nrom\*' matches none of the 5 trained parameters.*model\.embed_tokens"),
        ([{"match": "*", "lr": 1}, {"match": "*norm*"}], r"'\*norm\*' has nothing left, since '\*' comes before it"),
        ([{"match": "*", "optimizer": "sgmd"}], r"groups\[0\]: Unknown optimizer 'sgmd'\. Did you mean 'sgdm'"),
        (
            [{"match": "*", "weight_decy": 1}],
            r"groups\[0\] has 'weight_decy', which adamw does not\. Did you mean 'weig",
        ),
        ([{"match": "*", "optimizer": "sgdm", "beta1": 0.5}], r"'beta1', which sgdm does not"),
        ([{"mach": "*"}], r"without a text for 'match'.*'mach'"),
        ([{"match": "*", "lr": -1}], r"Wrong value lr=-1 in optimizer\.groups\[0\]\. Expected float, above 0"),
        ([{"match": "*", "lr": "fast"}], r"Wrong value lr=\"fast\" in optimizer\.groups\[0\]"),
        ([{"match": "*", "optimizer": "nowhere.at_all:Mine"}], r"Cannot import module 'nowhere\.at_all'"),
        ([{"match": "*", "optimizer": "json:dumps"}], r"is no optimizer"),
    ],
)
def test_a_mistake_is_one_line(groups: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        groups_of(groups)
    assert "\n" not in str(caught.value)


def test_roles_are_the_models_own() -> None:
    import torch

    model = tiny_llama(torch.float32)
    roles = roles_of(model)
    assert roles["model.embed_tokens.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["model.layers.0.mlp.up_proj.weight"] == "matrix"
    assert roles["model.norm.weight"] == roles["model.layers.0.self_attn.q_proj.bias"] == "vector"
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert roles_of(model)["model.embed_tokens.weight"] == "embedding"
