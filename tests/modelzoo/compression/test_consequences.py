"""What a layer's error costs the residual stream, against a block that holds the projected layer itself."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelzoo.compression.allocation import LayerShape
from modelzoo.compression.budget import spectra_of
from modelzoo.compression.choosing import blocks_of
from modelzoo.compression.compressing import compress_model
from modelzoo.compression.consequences import spectra_and_costs
from modelzoo.compression.methods import compress
from modelzoo.compression.streaming import BlockInputs, linears_of, moments_of

SHAPE = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "head_dim": 8}


def model_of(layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(**SHAPE, num_key_value_heads=1, num_hidden_layers=layers, attention_bias=True)
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    return model


def batches(number: int = 3) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(8)
    return [
        {"input_ids": torch.randint(0, 60, (2, 17), generator=generator), "use_cache": False} for _ in range(number)
    ]


@torch.no_grad()
def found_of(model: LlamaForCausalLM, ranks: dict[str, int | None]):
    (path, block), *_ = blocks_of(model).items()
    stream = BlockInputs(model, blocks_of(model), batches())
    layers = linears_of(block, path, tuple(f"{path}.{name}" for name in ranks))
    with moments_of(layers) as moments:
        usual = list(stream.outputs(path, block))
    ranks = {f"{path}.{name}": rank for name, rank in ranks.items()}
    spectra, costs = spectra_and_costs(stream, path, block, layers, moments, ranks, lambda tensor: tensor)
    return path, block, stream, layers, moments, usual, spectra, costs


@torch.no_grad()
def test_the_cost_is_what_the_projected_layer_does_to_the_stream():
    model = model_of()
    ranks = {"self_attn.q_proj": 5, "self_attn.v_proj": 3, "self_attn.o_proj": 7, "mlp.up_proj": 9, "mlp.down_proj": 4}
    path, block, stream, layers, moments, usual, spectra, costs = found_of(model, ranks)
    for name, rank in ranks.items():
        layer = layers[f"{path}.{name}"]
        factors = compress("mimic", layer.weight, layer.bias, moments[f"{path}.{name}"], rank)
        changed = copy.deepcopy(block)
        part = changed.get_submodule(name)
        part.weight.copy_(factors.weight_out @ factors.weight_in)
        part.bias = torch.nn.Parameter(factors.bias)
        moved = [
            ((after - before).square().sum(-1) / before.square().sum(-1)).flatten()
            for after, before in zip(stream.outputs(path, changed), usual, strict=True)
        ]
        spectrum = spectra[f"{path}.{name}"]
        torch.testing.assert_close(spectrum, factors.spectrum)
        expected = float(torch.cat(moved).mean()) / float(spectrum[rank:].sum())
        assert costs[f"{path}.{name}"] == pytest.approx(expected, rel=1e-6)
    again = list(stream.outputs(path, block))
    assert all(torch.equal(one, other) for one, other in zip(again, usual, strict=True))  # the block is as it was


@torch.no_grad()
def test_a_layer_whose_outputs_go_nowhere_costs_nothing_and_gets_one_rank():
    model = model_of(2)
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    reports = compress_model(model, batches(), keep=0.5, allocation="spectrum")
    ranks = {report.name: report.rank for report in reports}
    assert all(ranks[f"model.layers.1.self_attn.{name}_proj"] == 1 for name in "qkv")
    assert all(rank is None or rank > 1 for name, rank in ranks.items() if "layers.0.self_attn" in name)


@torch.no_grad()
def test_a_layer_that_loses_nothing_at_its_rank_is_told_by_all_that_varies():
    model = model_of()
    layer = model.model.layers[0].mlp.down_proj
    layer.weight.copy_(layer.weight[:, :1] @ layer.weight[:1])  # of rank one
    *_, costs = found_of(model, {"mlp.down_proj": 6})
    *_, of_all = found_of(model, {"mlp.down_proj": None})
    assert costs == of_all
    assert next(iter(costs.values())) > 0


@torch.no_grad()
def test_the_costs_of_two_workers_are_those_of_one():
    """Each adds up its own batches; the sums are what is divided."""
    model = model_of(2)
    blocks = blocks_of(model)
    shapes = {
        f"{path}.{name}": LayerShape(part.in_features, part.out_features)
        for path, block in blocks.items()
        for name, part in block.named_modules()
        if isinstance(part, torch.nn.Linear)
    }

    def twice(tensor: torch.Tensor) -> torch.Tensor:
        """A second worker with the same batches."""
        return tensor * 2

    _, alone = spectra_of(model, blocks, shapes, batches(), 0.5, lambda tensor: tensor)
    _, both = spectra_of(model, blocks, shapes, batches(), 0.5, twice)
    assert both == pytest.approx(alone, rel=1e-9)
