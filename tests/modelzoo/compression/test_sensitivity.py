"""Gradients at a layer's outputs, against autograd over a plain forward; and what they are for, in a whole model."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertModel

from backends.errors import UserError
from modelzoo.compression import compress_model
from modelzoo.compression.choosing import chosen_layers
from modelzoo.compression.sensitivity import sensitivities, summed_loss
from tests.modelzoo.compression.test_compressing import batches, pair


def alone(tensor: Tensor) -> Tensor:
    return tensor


def expected_gradients(model: torch.nn.Module, batch: dict[str, Any], layer: str) -> Tensor:
    """[tokens, out] for the summed loss of the next tokens, by autograd over the whole graph."""
    outputs = []

    def keep(part: torch.nn.Module, inputs: object, y: Tensor) -> None:
        y.retain_grad()
        outputs.append(y)

    handle = model.get_submodule(layer).register_forward_hook(keep)
    ids = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    model.zero_grad()
    return outputs[0].grad.flatten(0, 1)


@pytest.mark.parametrize("which", ["transformers'", "ours"])
@pytest.mark.parametrize("inside", ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_they_are_second_moments_of_the_loss_s_gradients(which: str, inside: str) -> None:
    model = pair()[which == "ours"]
    name = f"model.layers.1.{inside}"
    gradients = torch.cat([expected_gradients(model, batch, name) for batch in batches(3)])
    blocks, layers = chosen_layers(model, None)
    found = sensitivities(model, blocks, layers, batches(3), alone)[name]
    second = gradients.t() @ gradients
    weight = layers[name].weight.detach()
    assert found.of_inputs == (inside == "mlp.up_proj")
    torch.testing.assert_close(found.second, weight.t() @ second @ weight if found.of_inputs else second)
    torch.testing.assert_close(found.squared, second.trace())


def test_the_model_is_left_as_it_was() -> None:
    model = pair()[1].train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    calls = []
    own = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *given, **more: calls.append(1) or own(*given, **more)
    before = {name: (each.clone(), each.requires_grad) for name, each in model.named_parameters()}
    with torch.no_grad():
        found = sensitivities(model, *chosen_layers(model, None), batches(1), alone)
    assert all(float(each.squared) > 0 for each in found.values())
    assert len(calls) == 2  # forward, and again in the backward
    for name, each in model.named_parameters():
        assert each.grad is None
        assert each.requires_grad == before[name][1]
        assert torch.equal(each, before[name][0])
    assert model.training
    assert "forward" not in vars(model.model.layers[0])
    assert "forward" in vars(model.model.layers[1])
    assert not any(part._forward_hooks for part in model.modules())


def test_padding_counts_for_nothing_and_labels_are_the_model_s_own() -> None:
    model = pair()[0]
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    losses = [
        summed_loss(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False}),
        summed_loss(model, {"input_ids": ids, "attention_mask": mask, "use_cache": False, "labels": labels}) * 12 / 14,
    ]
    short = model(input_ids=ids[1:, :5]).logits
    expected = F.cross_entropy(model(input_ids=ids[:1]).logits[0, :-1], ids[0, 1:], reduction="sum")
    expected = expected + F.cross_entropy(short[0, :-1], ids[1, 1:5], reduction="sum")
    for loss in losses:
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


def bert(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=16)).double().eval()


def test_another_model_needs_labels() -> None:
    ids = torch.randint(40, (4, 7), generator=torch.Generator().manual_seed(1))
    for model in (bert(BertModel), bert(BertForSequenceClassification)):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(UserError, match=r"needs a loss, and Bert\w+ gives none .* Give batches with labels"):
            compress_model(model, [{"input_ids": ids}], keep=0.5, weighting="gradient")
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    labels = torch.tensor([0, 1, 1, 0])
    reports = compress_model(model, [{"input_ids": ids, "labels": labels}], keep=0.5, weighting="gradient")
    assert len(reports) == 12


@pytest.mark.parametrize("targets", ["own", "dense"])
@pytest.mark.parametrize("allocation", ["uniform", "spectrum"])
def test_what_nothing_reads_gets_no_rank(targets: str, allocation: str) -> None:
    """Half of the neurons vary most and are read by no one: least squares gives them the rank, the loss does not."""
    theirs, _ = pair()
    with torch.no_grad():
        for block in theirs.model.layers:
            block.mlp.up_proj.weight[:22] *= 2
            block.mlp.down_proj.weight[:, :22] = 0
    wanted = theirs(**batches(1, seed=5)[0]).logits
    distance = {}
    for weighting in ("equal", "gradient"):
        model = copy.deepcopy(theirs)
        options = {"keep": 0.6, "allocation": allocation, "match": "up_proj", "targets": targets}
        compress_model(model, batches(8), weighting=weighting, **options)
        with torch.no_grad():
            distance[weighting] = float((model(**batches(1, seed=5)[0]).logits - wanted).norm())
    assert distance["gradient"] < 0.75 * distance["equal"]


@pytest.mark.parametrize(
    ("choice", "asked"),
    [({"keep": 1.0}, []), ({"ranks": {"q_proj": 3, "up_proj": 30}}, ["q_proj"] * 3), ({"keep": 0.5}, None)],
    ids=str,
)
def test_only_what_is_replaced_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, choice: dict[str, Any], asked: list[str] | None
) -> None:
    seen: list[str] = []

    def watched(model: Any, blocks: Any, layers: Any, *rest: Any) -> Any:
        seen.extend(name.rpartition(".")[2] for name in layers)
        return sensitivities(model, blocks, layers, *rest)

    monkeypatch.setattr("modelzoo.compression.compressing.sensitivities", watched)
    compress_model(pair()[1], batches(1), weighting="gradient", **choice)
    assert len(seen) == 21 if asked is None else seen == asked


def test_a_mistake_in_the_ranks_is_told_before_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("gradients were asked for")

    monkeypatch.setattr("modelzoo.compression.compressing.sensitivities", refuse)
    for choice in ({"ranks": {"q_proj": 99}}, {"keep": 1.5}, {"keep": 0.5, "ranks": {"q_proj": 3}}):
        with pytest.raises(UserError, match="Expected"):
            compress_model(pair()[1], batches(1), weighting="gradient", **choice)


def test_gradients_that_are_not_finite_are_named() -> None:
    _, model = pair()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("inf")
    with pytest.raises(UserError, match=r"gradients at the outputs of layer 'model\.layers\.\d\.\S+' are not finite"):
        compress_model(model, batches(1), keep=0.5, weighting="gradient")
