"""Errors of layers alone and in their model, against backends whose error is known and against sums by hand."""

import pytest
import torch
import torch.nn.functional as F

from apps.parity.layer_errors import accumulated_errors, local_errors
from backends.routing import layers_of
from tests.apps.parity.known_errors import BLUNT, LOUDER, STORING, batch, pair


def nothing() -> None:
    pass


def both(reference, other, *batches):
    names = list(layers_of(reference))
    return (
        local_errors(reference, other, names, batches, nothing),
        accumulated_errors(reference, other, names, batches, nothing),
    )


def test_equal_models_have_no_error_at_all() -> None:
    reference, other = pair()
    local, accumulated = both(reference, other, batch(), batch(rows=1))
    assert local.keys() == accumulated.keys() == layers_of(reference).keys()
    for name, errors in local.items():
        assert [error.relative for error in errors if error] == [0.0] * (2 if name.endswith("attn") else 3)
        assert accumulated[name].relative == 0.0
    assert all(error.reference_power > 0 for error in accumulated.values())


@pytest.mark.parametrize("error", [0.5, 0.01, 1e-6])
def test_a_layer_alone_has_the_error_of_its_own_backend_whatever_lies_before_it(error: float) -> None:
    reference, other = pair({"match": "*", "use": LOUDER, "error": error})
    local, _ = both(reference, other, batch())
    assert local.pop("lm_head").output.relative == 0.0
    for each in local.values():
        assert [part.relative for part in each if part] == pytest.approx([error] * (3 if each.weight_gradient else 2))
        assert each.output.snr_db == pytest.approx(-20 * torch.tensor(error).log10().item(), abs=1e-5)


def test_errors_accumulate_from_the_layer_where_they_arise() -> None:
    reference, other = pair({"match": "model.layers.1.mlp.down_proj", "use": LOUDER, "error": 0.25})
    local, accumulated = both(reference, other, batch())
    changed = {name for name, errors in local.items() if errors.output.relative > 0}
    reached = {name for name, error in accumulated.items() if error.relative > 0}
    assert changed == {"model.layers.1.mlp.down_proj"}
    assert reached == {"model.layers.1.mlp.down_proj", "lm_head"}
    # By hand: the head gets norm(x + 1.25 y) in place of norm(x + y).
    kept = {}
    hooks = [
        reference.model.layers[1].mlp.down_proj.register_forward_hook(lambda *call: kept.update(y=call[-1])),
        reference.model.layers[1].register_forward_hook(lambda *call: kept.update(out=call[-1])),
    ]
    expected = reference(batch()["input_ids"]).logits
    found = reference.lm_head(reference.model.norm(kept["out"] + 0.25 * kept["y"]))
    for hook in hooks:
        hook.remove()
    assert accumulated["lm_head"].relative == pytest.approx(((found - expected).norm() / expected.norm()).item())


def test_gradients_are_weighed_by_what_the_whole_model_sends_back() -> None:
    """The powers of the reference against plain autograd on the whole model."""
    reference, other = pair()
    inputs = batch()
    local, _ = both(reference, other, inputs)
    logits = reference(inputs["input_ids"]).logits
    each = F.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten(), reduction="none")
    (each * inputs["grad_scale"].flatten()).sum().backward()
    for name, errors in local.items():
        if errors.weight_gradient is not None:
            weight = reference.get_submodule(name).weight
            assert errors.weight_gradient.reference_power == pytest.approx(weight.grad.square().sum().item())


def test_what_cannot_be_compared_is_none() -> None:
    local, _ = both(*pair({"match": "*.up_proj", "use": BLUNT}, {"match": "*.gate_proj", "use": STORING}), batch())
    blunt, storing = (local[f"model.layers.0.mlp.{name}_proj"] for name in ("up", "gate"))
    assert (blunt.output.relative, blunt.input_gradient, blunt.weight_gradient) == (0.0, None, None)
    assert storing.input_gradient is not None
    assert (storing.input_gradient.relative, storing.weight_gradient) == (0.0, None)
    reference, other = pair({"match": "*.up_proj", "use": BLUNT})
    swapped = local_errors(other, reference, ["model.layers.0.mlp.up_proj"], [batch()], nothing)
    assert swapped["model.layers.0.mlp.up_proj"].input_gradient is None


def test_tied_embeddings_are_a_model_like_any_other() -> None:
    local, _ = both(*pair({"match": "lm_head", "use": LOUDER, "error": 0.125}, tie_word_embeddings=True), batch())
    assert [error.relative for error in local["lm_head"] if error] == pytest.approx([0.125] * 3)
