"""Checkpoints whose layers hold two thin matrices: written, read, routed, and refused where they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import modelzoo
from backends.errors import UserError
from backends.routing import route
from modelzoo.checkpoint_writing import save_model
from modelzoo.compression import compress_model
from modelzoo.config_reading import load_config
from modelzoo.configuration_transformer import ConfigurationTransformer
from tests.modelzoo.compression.test_compressing import batches, pair

RANKS = {"q_proj": 7, "down_proj": 11, "layers.1.self_attn.q_proj": 4, "layers.1.mlp.down_proj": 13}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A compressed model, saved: ranks that differ from layer to layer, some with a bias."""
    _, model = pair()
    compress_model(model, batches(), ranks=RANKS)
    return save_model(model, tmp_path / "low")


def read(folder: Path) -> torch.nn.Module:
    config = ConfigurationTransformer().transform(
        load_config(model_name_or_path=folder), norm_dtype="float64", logits_dtype="float64"
    )
    return modelzoo.load_model(folder, config)


def test_what_is_read_computes_what_was_written(folder: Path) -> None:
    _, model = pair()
    compress_model(model, batches(), ranks=RANKS)
    found = read(folder)
    with torch.no_grad():
        logits = [each(**batches(1)[0]).logits for each in (model, found)]
    assert torch.equal(*logits)
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.self_attn.q_proj.weight_in" in names
    assert "model.layers.0.self_attn.q_proj.weight" not in names
    told = json.loads((folder / "config.json").read_text())["stored_layers"]
    assert told["model.layers.0.self_attn.q_proj"]["use"] == "lowrank"
    again = save_model(found, folder.parent / "again")
    assert json.loads((again / "config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_routing_leaves_what_is_stored_and_shows_it(folder: Path) -> None:
    model = read(folder)
    plan = route(model, [{"match": "*.up_proj", "use": "optical"}], "dense")
    assert "(as stored)" in plan.table()
    assert plan.backend_of("model.layers.0.mlp.down_proj").name == "lowrank"
    assert plan.backend_of("model.layers.0.mlp.up_proj").name == "optical"
    held = sum(each.numel() for name, each in model.named_parameters() if "q_proj" in name or "down_proj" in name)
    assert sum(row["parameters"] for row in plan.to_json() if row["match"] == "(as stored)") == held
    with pytest.raises(UserError, match="already stores weight_in, weight_out"):
        route(model, [{"match": "*.q_proj", "use": "optical"}])


@pytest.mark.parametrize(
    "told",
    [
        {"model.layers.7.self_attn.q_proj": {"use": "lowrank", "rank": 3}},
        {"model.norm": {"use": "lowrank", "rank": 3}},
        {"model.layers.0.self_attn.q_proj": {"rank": 3}},
    ],
)
def test_a_config_that_tells_of_other_layers_is_refused(folder: Path, told: dict[str, object]) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stored_layers": told}))
    with pytest.raises(UserError, match="Use the config.json that belongs to the weights"):
        read(folder)


def test_weights_of_other_ranks_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["stored_layers"]["model.layers.0.self_attn.q_proj"]["rank"] += 1
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="Of another shape: model.layers.0.self_attn.q_proj.weight_in"):
        read(folder)


def test_there_are_no_random_weights_for_it(folder: Path) -> None:
    config = ConfigurationTransformer().transform(load_config(model_name_or_path=folder))
    with pytest.raises(UserError, match="start from the weights of its own folder"):
        modelzoo.build_model(config)
