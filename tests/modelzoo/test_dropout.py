"""Counted dropout: which elements go, written out in Python; shares; independence; gradients; no trace when off."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import modelzoo
from backends.errors import UserError
from backends.kernels.dither import python_hash
from backends.state import collect_state, set_first_row
from modelzoo.configuration_transformer import ConfigurationTransformer
from modelzoo.dropout import STREAM, Dropout, seed_dropout
from tests.backends.kernels.test_dither import mix_in_python
from tests.modelzoo.llamas import llama_config


def zoo_config(**zoo_arguments: Any) -> Any:
    return ConfigurationTransformer().transform(llama_config(), **zoo_arguments)


def layer(p: float, seed: int = 1, step: int = 0, number: int = 7, first_row: int = 0) -> Dropout:
    made = Dropout(p)
    for name, value in {"seed": seed, "step": step, "layer": number, "first_row": first_row}.items():
        made.get_buffer(name).fill_(value)
    return made


def kept(shape: tuple[int, ...], p: float, **numbers: int) -> Tensor:
    """Which elements of an input of that shape are kept; the layer's state stays as it is."""
    with collect_state():
        return layer(p, **numbers)(torch.ones(shape)) != 0


def keyed_in_python(key: tuple[int, int], number: int) -> tuple[int, int]:
    first = mix_in_python(number % 2**32 ^ key[0], number >> 32 ^ key[1])
    return first, mix_in_python(first ^ key[1], 0)


def test_the_mask_is_the_one_written_out_in_python() -> None:
    p, seed, step, number, first_row = 0.3, 2**33 + 5, 2, 11, 2**32 + 3
    found = kept((2, 3, 4), p, seed=seed, step=step, number=number, first_row=first_row)
    counter = step + (number << 32)
    first = mix_in_python(counter % 2**32 ^ python_hash(0, 2 * STREAM), counter >> 32)
    key = first, mix_in_python(first ^ python_hash(0, 2 * STREAM + 1), 0)
    key = keyed_in_python(key, seed)
    for row in range(2):
        one, two = keyed_in_python(key, first_row + row)
        bits = [mix_in_python(position ^ one, two) for position in range(12)]
        signed = [word - 2**32 if word >= 2**31 else word for word in bits]
        assert found[row].flatten().tolist() == [(word / 2**32 + 0.5) >= p for word in signed]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_goes_is_p_and_the_rest_is_scaled(p: float) -> None:
    x = torch.rand(64, 32, 64) + 1.0
    y = layer(p)(x)
    count = x.numel()
    assert abs((y == 0).sum().item() - p * count) < 5 * math.sqrt(count * p * (1 - p))
    assert torch.equal(y[y != 0], (x * (1.0 / (1.0 - p)))[y != 0])
    assert y.mean().item() == pytest.approx(x.mean().item(), rel=5 * math.sqrt(p / (1 - p) / count) + 1e-3)


def test_rows_may_be_computed_anywhere() -> None:
    whole = kept((6, 5, 8), 0.4)
    for parts in ([1] * 6, [2, 4], [5, 1]):
        starts = [sum(parts[:index]) for index in range(len(parts))]
        pieces = [kept((rows, 5, 8), 0.4, first_row=start) for rows, start in zip(parts, starts, strict=True)]
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("other", [{"seed": 2}, {"step": 1}, {"number": 8}, {"first_row": 64}, {"first_row": 1}])
def test_another_seed_step_layer_or_row_has_an_unrelated_mask(other: dict[str, int]) -> None:
    shape, p = (64, 16, 32), 0.3
    agree = (kept(shape, p) == kept(shape, p, **other)).double().mean().item()
    expected = p * p + (1 - p) ** 2
    assert abs(agree - expected) < 5 * math.sqrt(expected * (1 - expected) / math.prod(shape))


def test_neighbours_are_unrelated() -> None:
    found = kept((64, 32, 32), 0.5)
    for a, b in ((found[1:], found[:-1]), (found[:, 1:], found[:, :-1]), (found[..., 1:], found[..., :-1])):
        assert abs((a == b).double().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(a.numel())


def test_the_step_counts_in_a_plain_loop_and_evaluation_is_the_identity() -> None:
    made, x = layer(0.5), torch.ones(4, 8, 16)
    first, second = made(x), made(x)
    assert made.get_buffer("step").item() == 2
    assert not torch.equal(first, second)
    assert torch.equal(second != 0, kept((4, 8, 16), 0.5, step=1))
    made.eval()
    assert made(x) is x
    assert made.get_buffer("step").item() == 2


def test_the_gradient_is_the_mask_also_when_the_forward_is_computed_again() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for run in (lambda f: f(x), lambda f: checkpoint(f, x, use_reentrant=False)):
        made = layer(0.4)
        (gradient,) = torch.autograd.grad(run(lambda x, made=made: made(x).square()).sum(), [x])
        mask = kept((3, 4, 5), 0.4).double() / 0.6
        torch.testing.assert_close(gradient, 2 * x.detach() * mask * mask)


def test_without_dropout_the_model_has_no_layer_and_no_buffer_more() -> None:
    plain = modelzoo.build_model(zoo_config())
    assert not [module for module in plain.modules() if isinstance(module, Dropout)]
    dropping = modelzoo.build_model(zoo_config(drop_attention=0.1, drop_residual=0.1, drop_embedding=0.1))
    assert plain.state_dict().keys() == dropping.state_dict().keys()
    names = [name for name, module in dropping.named_modules() if isinstance(module, Dropout)]
    assert len(names) == 1 + 3 * plain.config.num_hidden_layers
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, dropping.eval()(ids).logits)
        assert not torch.equal(plain.train()(ids).logits, dropping.train()(ids).logits)


def test_a_seed_and_the_layers_name_decide_the_masks_of_a_model() -> None:
    model = modelzoo.build_model(zoo_config(drop_residual=0.1))
    seed_dropout(model, 5)
    dropouts = [module for module in model.modules() if isinstance(module, Dropout)]
    assert len({module.get_buffer("layer").item() for module in dropouts}) == len(dropouts)
    assert {module.get_buffer("seed").item() for module in dropouts} == {python_hash(5, 0)}
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad(), collect_state():
        one = model.train()(ids).logits
        assert torch.equal(model(ids).logits, one)
        set_first_row(model, 1)
        assert torch.equal(model(ids[1:]).logits, one[1:])
        seed_dropout(model, 6)
        assert not torch.equal(model(ids).logits, one)


def test_a_share_that_cannot_be_is_refused() -> None:
    for share in (1.0, -0.1, True, "x"):
        with pytest.raises(UserError, match=r"drop_residual is .*Expected a number from 0 to below 1"):
            zoo_config(drop_residual=share)
