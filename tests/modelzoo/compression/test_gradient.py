"""Learned factors: against autograd and torch's AdamW, and never better than the closed form."""

import pytest
import torch

from backends.errors import UserError
from modelzoo.compression.gradient import NAMES, Twin, learn_factors, loss_and_gradients
from modelzoo.compression.methods import compress, measured_error
from modelzoo.compression.moments import Moments


def problem(seed: int = 0):
    """A layer of 10 to 8 features with a bias, its inputs in batches, and random factors of rank 3."""
    make = torch.Generator().manual_seed(seed)
    layer = torch.nn.Linear(10, 8, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.normal_(generator=make)
        layer.bias.normal_(generator=make)
    mixed = torch.randn(10, 10, generator=make).double()
    x = torch.randn(64, 10, generator=make).double() @ mixed + 1
    tensors = {
        "weight_in": torch.randn(3, 10, generator=make).double(),
        "weight_out": torch.randn(8, 3, generator=make).double(),
        "bias": torch.randn(8, generator=make).double(),
    }
    return layer, x, tensors


def test_gradients_are_those_of_autograd():
    layer, x, tensors = problem()
    y = layer(x).detach()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    found = x @ leaves["weight_in"].t() @ leaves["weight_out"].t() + leaves["bias"]
    expected = torch.nn.functional.mse_loss(found, y)
    expected.backward()
    loss, gradients = loss_and_gradients(tensors, x, y)
    torch.testing.assert_close(loss, expected.detach())
    for name in NAMES:
        torch.testing.assert_close(gradients[name], leaves[name].grad)


def test_steps_are_those_of_torchs_adamw_behind_its_clipping():
    layer, x, tensors = problem()
    y = layer(x).detach()
    leaves = [tensors[name].clone().requires_grad_() for name in NAMES]
    optimizer = torch.optim.AdamW(leaves, lr=3e-3)
    twin = Twin({name: tensor.clone() for name, tensor in tensors.items()}, lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(x @ leaves[0].t() @ leaves[1].t() + leaves[2], y).backward()
        torch.nn.utils.clip_grad_norm_(leaves, 2.0)
        optimizer.step()
        with torch.no_grad():
            twin.step(*loss_and_gradients(twin.tensors, x, y), 2.0)
    for leaf, name in zip(leaves, NAMES, strict=True):
        torch.testing.assert_close(twin.tensors[name].detach(), leaf.detach(), rtol=1e-10, atol=1e-10)


class Holder(torch.nn.Module):
    """A model of one layer."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is first used
@pytest.mark.parametrize("compiled", [False, True])
def test_learning_comes_near_the_closed_form_and_never_beyond(compiled):
    layer, x, _ = problem()
    moments = Moments.empty(10)
    moments.add(x)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    start, best = (compress(method, weight, bias, moments, 3) for method in ("svd", "mimic"))
    model = Holder(layer)
    rounds = 30 if compiled else 1500
    found, losses = learn_factors(
        model, {"layer": layer}, {"layer": start}, [{"x": x}] * rounds, lr=1e-2, clip=1e9, compiled=compiled
    )
    begin, end, least = (measured_error(weight, bias, each, moments) for each in (start, found["layer"], best))
    assert least <= end < begin
    if not compiled:
        assert end < least + 0.05 * (begin - least)
    assert len(losses["layer"]) == -(-rounds // 8)
    assert torch.equal(layer.weight, weight)
    assert not layer._forward_hooks


def test_the_best_window_is_kept_not_the_last():
    layer, x, _ = problem()
    moments = Moments.empty(10)
    moments.add(x)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    start = compress("svd", weight, bias, moments, 3)
    batches = [{"x": x}] * 64 + [{"x": 30 * x}] * 8  # at the end come inputs of another kind
    found, losses = learn_factors(Holder(layer), {"layer": layer}, {"layer": start}, batches, lr=0.05, compiled=False)
    assert losses["layer"][-1] > 2 * min(losses["layer"])
    # of 8 features, so eight times the mean over elements
    assert measured_error(weight, bias, found["layer"], moments) < 8 * 1.1 * min(losses["layer"])


def test_a_loss_that_is_not_finite_names_its_layer():
    layer, x, _ = problem()
    moments = Moments.empty(10)
    moments.add(x)
    start = compress("svd", layer.weight.detach(), None, moments, 3)
    with pytest.raises(UserError, match="loss of layer 'layer' is not finite"):
        learn_factors(Holder(layer), {"layer": layer}, {"layer": start}, [{"x": x * float("inf")}], compiled=False)
