"""Weights for a run: a checkpoint's or the seed's, with every layer given its backend."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apps.training.config import parse
from apps.training.models import load_weights
from apps.training.step_plan import plan_step
from backends.errors import UserError


def load(settings: dict[str, str], **changes: str | None) -> torch.nn.Module:
    changed = settings | {key.replace("__", "."): value for key, value in changes.items()}
    config = parse([f"{key}={value}" for key, value in changed.items() if value is not None])
    return load_weights(config, plan_step(config).model_config, torch.device("cpu"))


def test_the_seed_decides_random_weights(settings: dict[str, str]) -> None:
    first, same, other = (load(settings, training__seed=seed) for seed in ("1", "1", "2"))
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.get_parameter(weight), same.get_parameter(weight))
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))


def test_a_checkpoint_is_loaded_in_the_asked_dtype(settings: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    stored = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model))
    stored.save_pretrained(tmp_path / "model")
    model = load(
        settings,
        checkpoint__config_name=None,
        checkpoint__model_name_or_path=str(tmp_path / "model"),
        model__dtype="bfloat16",
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored.get_parameter(name).bfloat16()), name


def test_rules_are_checked(settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match="mpl"):
        load(settings, backend__rules="[{match: '*.mpl.*', use: dense}]")
