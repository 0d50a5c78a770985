"""Groups, depths and what is worst."""

import math

from apps.parity.results import depths, middle, snr_db, why_empty, worst
from tests.apps.parity.found import layer, variant


def test_layers_of_all_blocks_are_a_group_and_the_worst_comes_first() -> None:
    names = [f"model.layers.{block}.mlp.{name}" for block in (0, 1, 10) for name in ("up_proj", "down_proj")]
    found = variant("v", *(layer(name, 0.5 if name == "model.layers.10.mlp.up_proj" else 0.3) for name in names))
    groups = found.groups()
    assert list(groups) == ["model.layers.*.mlp.up_proj", "model.layers.*.mlp.down_proj"]
    assert [len(group) for group in groups.values()] == [3, 3]
    assert worst(groups["model.layers.*.mlp.up_proj"], "output").layer == "model.layers.10.mlp.up_proj"
    assert middle(groups["model.layers.*.mlp.up_proj"], "output") == 0.3


def test_no_number_is_worse_than_any_and_no_error_is_last() -> None:
    found = [layer("a", 5.0), layer("b", math.nan), layer("c", None)]
    assert worst(found, "output").layer == "b"
    assert worst(found[::2], "output").layer == "a"
    assert math.isnan(middle([found[2]], "output"))


def test_the_head_comes_after_the_last_block() -> None:
    assert depths(["model.layers.3.mlp.up_proj", "lm_head", "model.layers.0.self_attn"]) == {
        "model.layers.3.mlp.up_proj": 3,
        "lm_head": 4,
        "model.layers.0.self_attn": 0,
    }
    assert depths(["encoder", "head"]) == {"encoder": 0, "head": 0}


def test_an_empty_picture_says_why() -> None:
    found = [variant("v", layer("a", 0.0))]
    assert why_empty(found, "output") == "no error: equal bits"
    assert why_empty(found, "weight_gradient") == "nothing to compare"
    assert why_empty([*found, variant("w", layer("a", math.nan))], "output") == "no error that is finite"


def test_decibels_of_a_relative_error() -> None:
    assert snr_db(0.1) == 20.0
    assert snr_db(0.0) == math.inf
    assert snr_db(math.inf) == -math.inf
    assert math.isnan(snr_db(math.nan))
