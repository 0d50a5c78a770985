"""Variants compute on the same memory, and one with parameters of its own leaves the others theirs."""

from pathlib import Path

import pytest
import torch

from apps.parity.entries import read_entries
from apps.parity.variants import Variant, load_model, plan_variants, read_config
from backends.errors import UserError
from tests.apps.parity.known_errors import LOUDER, STORING, UNSEEN, settings_for


def planned(model: Path, *backends: object, **changes: object) -> tuple[object, list[Variant]]:
    settings = settings_for("nowhere", model, *backends, **changes)
    config = read_config(settings)
    return load_model(settings, config, torch.device("cpu")), plan_variants(
        read_entries(settings.backends), config, settings
    )


def test_all_share_the_weights_memory(tiny_model: Path) -> None:
    weights, variants = planned(tiny_model, "dense", LOUDER)
    places = {name: weight.data_ptr() for name, weight in weights.named_parameters()}
    for variant in variants:
        model = variant.build(weights)
        assert {name: weight.data_ptr() for name, weight in model.named_parameters()} == places
        assert not model.training
        assert all(weight.requires_grad for weight in model.parameters())


def test_a_backend_with_parameters_of_its_own_takes_none_away(tiny_model: Path) -> None:
    weights, (dense, storing) = planned(tiny_model, "dense", STORING)
    ids = torch.arange(8)[None]
    expected = dense.build(weights)(ids).logits
    other = storing.build(weights)
    assert other.model.layers[0].mlp.up_proj.weight is None
    assert torch.equal(other(ids).logits, expected)
    assert torch.equal(dense.build(weights)(ids).logits, expected)


def test_a_variant_is_routed_as_its_entry_says(tiny_model: Path) -> None:
    rules = [{"match": "*.mlp.*", "use": LOUDER, "error": 0.5}]
    _, (_, variant) = planned(tiny_model, "dense", {"rules": rules, "name": "mlp"})
    assert variant.name == "mlp"
    assert str(variant.routing.backend_of("model.layers.0.mlp.up_proj")) == f"{LOUDER}(error=0.5)"
    assert str(variant.routing.backend_of("model.layers.0.self_attn")) == "dense"


def test_ranges_that_nobody_has_seen_are_told_before_anything_is_loaded(tiny_model: Path) -> None:
    with pytest.raises(
        UserError, match="calibrate_batches=0 leaves 'largest' of layer 'model.layers.0.self_attn.q_proj'"
    ):
        planned(tiny_model, "dense", UNSEEN, calibrate_batches=0)
