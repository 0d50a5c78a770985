"""Whole models: a report against running the model, ours against transformers', several workers against one."""

import copy
import threading

import pytest
import torch
from transformers import LlamaForCausalLM

from backends.errors import UserError
from backends.layers import BackendLinear
from modelzoo.compression import compress_model
from tests.modelzoo.llamas import llama_config, twins

TOKENS = 24


def batches(number: int = 4, seed: int = 0) -> list[dict[str, object]]:
    make = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(61, (3, TOKENS), generator=make), "use_cache": False} for _ in range(number)]


def pair(norm_dtype: str = "float64") -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.manual_seed(11)
    return twins(llama_config(num_hidden_layers=3), torch.float64, norm_dtype=norm_dtype, logits_dtype="float64")


def inputs_of(model: torch.nn.Module, layer: str, data: list[dict[str, object]]) -> torch.Tensor:
    """What a layer is given in plain runs of the whole model."""
    seen = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


@pytest.mark.parametrize("inputs", ["compressed", "dense"])
@pytest.mark.parametrize("method", ["svd", "mimic"])
def test_a_report_says_what_each_layer_does_in_the_model(method, inputs):
    dense, model = pair()
    reports = compress_model(model, batches(), method=method, keep=0.5, inputs=inputs)
    assert len(reports) == 3 * 7
    for report in reports:
        layer = model.get_submodule(report.name)
        assert isinstance(layer, BackendLinear)
        assert layer.weight_in.shape == (report.rank, report.shape.in_features)
        linear = dense.get_submodule(report.name)
        block, _, inside = report.name.removeprefix("model.layers.").partition(".")
        if inputs == "compressed" and inside.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
            # in front of these only earlier blocks were replaced, and those are as they were
            x = inputs_of(model, report.name, batches())
        elif inputs == "dense":
            x = inputs_of(dense, report.name, batches())
        else:
            continue
        with torch.no_grad():
            y, found = linear(x), layer(x)
        error = (y - found).square().sum(1).mean()
        assert report.measured == pytest.approx(float(error), rel=1e-6), (block, inside)
        assert report.variance == pytest.approx(float(y.var(0, correction=0).sum()), rel=1e-6)
        if method == "mimic":
            assert report.predicted == pytest.approx(report.measured, rel=1e-6)


def test_transformers_model_and_ours_are_compressed_alike():
    theirs, ours = pair(norm_dtype="float32")  # as transformers has it in every dtype
    reports = [compress_model(model, batches(), keep=0.6, allocation="spectrum") for model in (theirs, ours)]
    assert [(each.name, each.rank) for each in reports[0]] == [(each.name, each.rank) for each in reports[1]]
    assert {each.rank for each in reports[0]} != {reports[0][0].rank}
    with torch.no_grad():
        logits = [model(**batches(1, seed=5)[0]).logits for model in (theirs, ours)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)
    assert sum(each.numbers for each in reports[0]) <= 0.6 * sum(each.shape.dense for each in reports[0])


def test_better_methods_are_better_in_the_first_block_and_in_the_whole():
    errors, logits = {}, {}
    for method in ("svd", "svd_llm", "mimic"):
        dense, model = pair()
        reports = compress_model(model, batches(), method=method, keep=0.5)
        errors[method] = [each.measured for each in reports if ".layers.0." in each.name]
        with torch.no_grad():
            logits[method] = sum(
                float((dense(**each).logits - model(**each).logits).square().mean()) for each in batches()
            )
    for svd, svd_llm, mimic in zip(*errors.values(), strict=True):
        assert mimic <= svd_llm * (1 + 1e-9)
        assert svd_llm <= svd * (1 + 1e-9)
    assert logits["mimic"] < logits["svd"]


@pytest.mark.parametrize("weighting", ["equal", "gradient"])
@pytest.mark.parametrize("targets", ["own", "dense"])
def test_four_workers_find_what_one_finds(targets, weighting):
    _, alone = pair()
    choices = {"keep": 0.5, "allocation": "spectrum", "targets": targets, "weighting": weighting}
    expected = compress_model(alone, batches(8), **choices)
    meet, sums = threading.Barrier(4), {}

    def sum_(tensor: torch.Tensor) -> torch.Tensor:
        rank = int(threading.current_thread().name)
        sums[rank] = tensor
        meet.wait(60)
        total = sums[0] + sums[1] + sums[2] + sums[3]
        meet.wait(60)
        return total

    models = [pair()[1] for _ in range(4)]
    found = {}

    def work(rank: int) -> None:
        found[rank] = compress_model(models[rank], batches(8)[2 * rank : 2 * rank + 2], sum_=sum_, **choices)

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(4):
        assert [each.rank for each in found[rank]] == [each.rank for each in expected]
        for name, parameter in alone.named_parameters():
            other = models[rank].get_parameter(name)
            if name.endswith("weight_out"):  # directions have no sign: compare what the factors do
                part = name.removesuffix(".weight_out")
                ours, theirs = (
                    one.get_submodule(part).weight_out @ one.get_submodule(part).weight_in
                    for one in (models[rank], alone)
                )
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
            elif not name.endswith("weight_in"):
                torch.testing.assert_close(other, parameter, rtol=1e-6, atol=1e-8)


def test_ranks_by_name_leave_the_other_layers_and_those_above_break_even_as_they_were():
    _, model = pair()
    reports = compress_model(model, batches(), ranks={"q_proj": 9, "gate_proj": 30})
    assert {(each.name.rpartition(".")[2], each.rank) for each in reports} == {("q_proj", 9), ("gate_proj", None)}
    kept = model.get_submodule("model.layers.1.mlp.gate_proj")
    assert kept.weight is not None
    assert model.get_submodule("model.layers.1.self_attn.o_proj").weight.shape == (32, 32)


def test_where_no_layer_is_to_be_compressed_none_is_learned():
    def learned(layers, ranks):
        raise AssertionError("nothing is to be learned")

    _, model = pair()
    for settings in ({"keep": 1.0}, {"ranks": {"q_proj": 32}}):
        reports = compress_model(model, batches(1), method="svd", inputs="dense", learned=learned, **settings)
        assert all(each.rank is None for each in reports)


def refused(told: str, **settings: object) -> None:
    _, model = pair()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    data = settings.pop("data", batches())
    if settings.pop("spoilt", False):
        with torch.no_grad():
            model.get_submodule("model.layers.0.input_layernorm").weight[3] = float("inf")
        before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(UserError, match=told):
        compress_model(model, data, **settings)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())


def test_mistakes_are_named_and_leave_the_model_as_it_was():
    refused("Did you mean 'svd_llm'", method="svdllm", keep=0.5)
    refused("Unknown allocation 'unifrom'. Did you mean 'uniform'", keep=0.5, allocation="unifrom")
    refused("Unknown inputs 'denses'. Did you mean 'dense'", keep=0.5, inputs="denses")
    refused("Unknown weighting 'gradients'. Did you mean 'gradient'", keep=0.5, weighting="gradients")
    refused("got method='svd'. Expected method='mimic'", keep=0.5, method="svd", weighting="gradient")
    refused("got match=up_proj too", ranks={"q_proj": 3}, match="up_proj")
    refused("got allocation='spectrum' too", ranks={"q_proj": 3}, allocation="spectrum")
    refused("Expected the share", keep=1.5)
    refused("Expected one of", keep=0.5, ranks={"q_proj": 3})
    refused("rank 33. Expected 1 to 32", ranks={"q_proj": 33})
    refused("rank 4.0. Expected 1 to 32, a whole number", ranks={"q_proj": 4.0})
    refused("names no linear layer", ranks={"qq_proj": 3})
    refused("is in none of the model's blocks", keep=0.5, match="lm_head")
    refused("at least one batch", keep=0.5, data=[])
    refused("inputs of layer 'model.layers.0.self_attn.q_proj' are not finite", keep=0.5, spoilt=True)


def test_what_is_compressed_already_is_not_compressed_again():
    model = LlamaForCausalLM(llama_config()).eval()
    compress_model(model, batches(), keep=0.5)
    with pytest.raises(UserError, match="stores weight_in, weight_out, bias already"):
        compress_model(model, batches(), keep=0.5)


class InPlace(torch.nn.Module):
    """Two layers are given one tensor, which is changed in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x.clone()
        y = self.first(inner)
        return x + y + self.second(inner.relu_())


@pytest.mark.parametrize("targets", ["own", "dense"])
def test_an_input_that_was_changed_in_place_is_another_one(targets):
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.blocks = torch.nn.ModuleList([InPlace().double()])
    model.forward = lambda x: model.blocks[0](x)
    x = torch.randn(200, 16, dtype=torch.float64)
    dense = copy.deepcopy(model.blocks[0].second)
    _, report = compress_model(model, [{"x": x}], ranks={"first": 4, "second": 4}, targets=targets)
    with torch.no_grad():
        error = dense(x.relu()) - model.blocks[0].second(x.relu())
    assert report.measured == pytest.approx(float(error.square().sum(1).mean()), rel=1e-6)


@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
@pytest.mark.parametrize("padding", [None, torch.arange(5) >= torch.tensor([[5], [3]])], ids=["whole", "padded"])
def test_torchs_own_encoder_is_compressed_and_runs(allocation, padding):
    """Its fused evaluation path would read the weights that are gone."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    batch = {"src": x, "src_key_padding_mask": padding}
    reports = compress_model(model, [batch], keep=0.6, allocation=allocation)
    assert [report.name for report in reports] == [f"layers.{block}.linear{one}" for block in (0, 1) for one in (1, 2)]
    with torch.no_grad():
        evaluated = model(**batch)
        torch.testing.assert_close(evaluated, model.train()(**batch))
