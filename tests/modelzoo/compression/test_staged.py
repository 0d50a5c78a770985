"""Whole models towards what the dense model gives: stages, reports against runs of both models, and mistakes."""

import pytest
import torch

from backends.errors import UserError
from modelzoo.compression import compress_model
from modelzoo.compression.choosing import blocks_of
from modelzoo.compression.staged import Stage, stages_of
from modelzoo.compression.streaming import BlockInputs, linears_of
from tests.modelzoo.compression.test_compressing import batches, inputs_of, pair

STAGES = [
    Stage(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], {}),
    Stage(["self_attn.o_proj"], {"self_attn.o_proj": ""}),
    Stage(["mlp.gate_proj", "mlp.up_proj"], {}),
    Stage(["mlp.down_proj"], {"mlp.down_proj": "post_attention_layernorm"}),
]


@pytest.mark.parametrize("share", [1.0, 0.01], ids=["as it is", "adding little"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("whose", [0, 1], ids=["transformers", "ours"])
def test_stages_and_what_their_layers_are_added_to_are_found(whose, dtype, share):
    model = pair()[whose].to(dtype)
    path, block = next(iter(blocks_of(model).items()))
    with torch.no_grad():
        block.self_attn.o_proj.weight.mul_(share)  # in 16 bits the stream behind attention is near that before it
        found = stages_of(
            BlockInputs(model, blocks_of(model), batches()),
            path,
            block,
            linears_of(block, "", tuple(f".{name}" for name, _ in block.named_modules())),
        )
    assert [[name.removeprefix(".") for name in stage.names] for stage in found] == [stage.names for stage in STAGES]
    assert [{name.removeprefix("."): tap for name, tap in stage.taps.items()} for stage in found] == [
        stage.taps for stage in STAGES
    ]


def test_a_report_says_how_far_each_layer_is_from_the_dense_model():
    dense, model = pair()
    reports = {}

    def check(report) -> None:
        """When the layer was just replaced, all before it have been: run both models whole."""
        reports[report.name] = report
        x = [inputs_of(each, report.name, batches()) for each in (dense, model)]
        with torch.no_grad():
            y, found = dense.get_submodule(report.name)(x[0]), model.get_submodule(report.name)(x[1])
        prefix, _, kind = report.name.rpartition(".")
        block = prefix.rpartition(".")[0]
        tap = {"o_proj": block, "down_proj": f"{block}.post_attention_layernorm"}.get(kind)
        if tap is not None:
            before = [inputs_of(each, tap, batches()) for each in (dense, model)]
            y = y + before[0] - before[1]
        assert report.measured == pytest.approx(float((y - found).square().sum(1).mean()), rel=1e-6)
        assert report.predicted == pytest.approx(report.measured, rel=1e-6)
        assert report.variance == pytest.approx(float(y.var(0, correction=0).sum()), rel=1e-6)

    returned = compress_model(model, batches(), keep=0.5, targets="dense", on_layer=check)
    assert [each.name for each in returned] == list(reports)
    assert len(reports) == 3 * 7
    assert all(each.rank is not None for each in returned)


def test_the_model_comes_nearer_to_the_dense_one_and_both_kinds_of_model_alike():
    dense, _ = pair()
    found = {}
    for targets in ("own", "dense"):
        theirs, ours = pair(norm_dtype="float32")
        for model in (theirs, ours):
            compress_model(model, batches(), keep=0.5, targets=targets, allocation="spectrum")
        with torch.no_grad():
            logits = [torch.cat([model(**each).logits for each in batches()]) for model in (dense, theirs, ours)]
        torch.testing.assert_close(logits[1], logits[2], rtol=1e-5, atol=1e-5)
        found[targets] = float((logits[0] - logits[2]).square().mean())
    assert found["dense"] < 0.9 * found["own"]


def test_a_layer_that_stays_dense_says_what_its_predecessors_cost():
    _, model = pair()
    reports = compress_model(model, batches(), ranks={"q_proj": 9, "o_proj": 30}, targets="dense")
    kept = [each for each in reports if each.name.endswith("o_proj")]
    assert all(each.rank is None and each.measured == each.predicted > 0 for each in kept)


def test_mistakes_are_named_and_leave_the_model_as_it_was():
    def refused(told: str, data=None, **settings) -> None:
        _, model = pair()
        before = {name: each.clone() for name, each in model.state_dict().items()}
        with pytest.raises(UserError, match=told):
            compress_model(model, batches() if data is None else data, keep=0.5, **settings)
        assert all(torch.equal(model.state_dict()[name], each) for name, each in before.items())

    refused("Did you mean 'dense'", targets="dens")
    refused("got method='svd' and inputs='compressed'", targets="dense", method="svd")
    refused("got method='mimic' and inputs='dense'", targets="dense", inputs="dense")
    short = [{"input_ids": torch.arange(20)[None], "use_cache": False}]
    refused("mlp.down_proj' of 44 features to 20 tokens", targets="dense", data=short)
    enough_for_most = [{"input_ids": torch.arange(40)[None], "use_cache": False}]  # not for the widest of each block
    refused("mlp.down_proj' of 44 features to 40 tokens", targets="dense", data=enough_for_most)
