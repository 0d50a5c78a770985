"""Backends with statistics see their ranges first, and nothing that is measured moves them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apps.parity.batches import Batches, find_dataset
from apps.parity.comparing import compare, ready
from apps.parity.entries import read_entries
from apps.parity.variants import load_model, plan_variants, read_config
from apps.training.config_schema import ModelConfig
from tests.apps.parity.known_errors import LOUDER, UNSEEN, settings_for
from tests.backends.tiny_transformer import SCALED


def opened(dataset: Path, model: Path, *backends: object, **changes: object):
    settings = settings_for(dataset, model, *backends, **changes)
    config, cpu = read_config(settings), torch.device("cpu")
    batches = Batches(find_dataset(settings, config.vocab_size), settings, cpu)
    variants = plan_variants(read_entries(settings.backends), config, settings)
    weights = load_model(settings, config, cpu)
    return settings, batches, [(variant, ready(variant, weights, batches, settings)) for variant in variants]


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("use", [SCALED, UNSEEN])
def test_calibration_moves_the_state_and_measuring_does_not(tiny_dataset: Path, tiny_model: Path, use: str) -> None:
    settings, batches, (reference, other) = opened(tiny_dataset, tiny_model, "dense", use)
    state = state_of(other[1])
    assert all(value.isfinite().all() for value in state.values())
    assert all(value > 0 for value in state.values())
    assert {int(value) for name, value in state.items() if name.endswith("step")} <= {settings.calibrate_batches}
    _, found = compare(reference, other, batches, settings)
    assert all(torch.equal(value, state[name]) for name, value in state_of(other[1]).items())
    assert found.kl is not None
    routing = other[0].routing
    assert all(layer.changed == (routing.backend_of(layer.layer).name == use) for layer in found.layers)


def test_the_reference_may_have_statistics_too(tiny_dataset: Path, tiny_model: Path) -> None:
    settings, batches, (reference, other) = opened(tiny_dataset, tiny_model, SCALED, SCALED)
    own, found = compare(reference, other, batches, settings)
    assert own.evaluation == found.evaluation
    assert found.kl == 0.0
    assert found.changed_layers == found.layers
    assert {layer.relative("accumulated") for layer in found.layers} == {0.0}


def test_wider_logits_and_articles_apart_are_measured_as_a_run_would(tiny_dataset: Path, tiny_model: Path) -> None:
    model = ModelConfig(max_seq_length=32, dtype="bfloat16", article_attention=True)
    settings = replace(settings_for(tiny_dataset, tiny_model, "dense", {"use": LOUDER, "error": 0.5}), model=model)
    config, cpu = read_config(settings), torch.device("cpu")
    batches = Batches(find_dataset(settings, config.vocab_size), settings, cpu)
    weights = load_model(settings, config, cpu)
    variants = plan_variants(read_entries(settings.backends), config, settings)
    reference, other = ((variant, ready(variant, weights, batches, settings)) for variant in variants)
    _, found = compare(reference, other, batches, settings)
    attention = [layer for layer in found.layers if layer.kind == "attention"]
    assert [layer.relative("output") for layer in attention] == pytest.approx([0.5] * 2, rel=0.01)
