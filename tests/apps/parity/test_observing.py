"""A watched model computes what it computed before; a layer asked alone answers as it did in the model."""

import pytest
import torch

from apps.parity.observing import Call, answer, watched
from backends.routing import layers_of
from tests.apps.parity.known_errors import BLUNT, STORING, batch, pair


def test_every_call_of_a_layer_is_seen_with_its_input_and_output_and_nothing_changes() -> None:
    model, _ = pair()
    ids = batch()["input_ids"]
    expected = model(ids).logits
    seen = {}

    def watch(name, layer, call, output):
        assert name not in seen
        seen[name] = call, output
        assert torch.equal(answer(layer, call, None).output, output)

    with watched(model, layers_of(model), watch):
        assert torch.equal(model(ids).logits, expected)
    assert seen.keys() == layers_of(model).keys()
    assert [tuple(x.shape) for x in seen["model.layers.0.self_attn"][0].tensors] == [(2, 4, 8, 8), *[(2, 2, 8, 8)] * 2]
    assert torch.equal(seen["lm_head"][1], expected)
    seen.clear()
    model(ids)
    assert not seen


def test_watching_ends_with_an_error_too() -> None:
    model, _ = pair()
    with pytest.raises(ZeroDivisionError), watched(model, layers_of(model), lambda *_: 1 / 0):
        model(batch()["input_ids"])
    model(batch()["input_ids"])


def test_the_gradients_of_a_linear_are_those_of_the_formulas() -> None:
    layer = torch.nn.Linear(3, 5, dtype=torch.float64)
    x, dy = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    found = answer(layer, Call((x,)), dy)
    assert found.inputs is not None
    assert found.weight is not None
    torch.testing.assert_close(found.output, x @ layer.weight.T + layer.bias)
    torch.testing.assert_close(found.inputs[0], dy @ layer.weight)
    torch.testing.assert_close(found.weight, torch.einsum("bto,bti->oi", dy, x))


def test_the_gradients_of_attention_are_those_of_the_formulas() -> None:
    model, _ = pair(num_key_value_heads=4)
    layer = model.model.layers[0].self_attn
    q, k, v, dy = torch.randn(4, 1, 4, 6, 8, dtype=torch.float64)
    found = answer(layer, Call((q, k, v), {"mask": None, "scale": 0.3}), dy)
    assert found.inputs is not None
    scores = (q @ k.mT * 0.3).masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    weights = scores.softmax(-1)
    toward_weights = dy @ v.mT
    toward_scores = weights * (toward_weights - (weights * toward_weights).sum(-1, keepdim=True)) * 0.3
    torch.testing.assert_close(found.output, weights @ v)
    for gradient, expected in zip(
        found.inputs, (toward_scores @ k, toward_scores.mT @ q, weights.mT @ dy), strict=True
    ):
        torch.testing.assert_close(gradient, expected)
    assert found.weight is None


@pytest.mark.parametrize(("use", "has_gradient"), [(BLUNT, False), (STORING, True)])
def test_a_gradient_that_does_not_exist_is_none(use: str, has_gradient: bool) -> None:
    _, model = pair({"match": "*.up_proj", "use": use})
    layer = model.model.layers[0].mlp.up_proj
    found = answer(layer, Call((torch.randn(2, 32, dtype=torch.float64),)), torch.randn(2, 44, dtype=torch.float64))
    assert (found.inputs is not None) == has_gradient
    assert found.weight is None
