"""The low-rank layer against the dense layer it was made of, and its best approximation in numpy."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import load
from backends.errors import UserError
from backends.layers import BackendLinear
from backends.ranks import break_even, rank_after, rank_for


def layer(in_features: int, out_features: int, bias: bool, dtype: torch.dtype = torch.float64) -> BackendLinear:
    torch.manual_seed(3)
    return BackendLinear(in_features, out_features, bias=bias, dtype=dtype)


@given(sides=st.tuples(st.integers(1, 12), st.integers(1, 12)), bias=st.booleans(), asks=st.booleans(), data=st.data())
def test_it_computes_with_the_nearest_matrix_of_its_rank(sides, bias, asks, data):
    rank = data.draw(st.integers(1, min(sides)))
    dense, low = layer(*sides, bias), layer(*sides, bias)
    low.set_backend(load("lowrank", rank=rank, bias=asks))
    left, values, right = numpy.linalg.svd(dense.weight.detach().numpy(), full_matrices=False)
    nearest = torch.from_numpy(left[:, :rank] * values[:rank] @ right[:rank])
    x = torch.randn(5, sides[0], dtype=torch.float64)
    expected = x @ nearest.t() + (0 if dense.bias is None else dense.bias)
    torch.testing.assert_close(low(x), expected)
    assert ("bias" in low.stored) == (bias or asks)
    assert low.weight is None


def test_both_factors_and_the_bias_are_trained_by_the_exact_gradient():
    low = layer(6, 5, bias=True)
    low.set_backend(load("lowrank", rank=3))
    x = torch.randn(4, 6, dtype=torch.float64)
    tensors = tuple(low.parameters())
    assert len(tensors) == 3

    def function(*given):
        names = dict(zip(dict(low.named_parameters()), given, strict=True))
        return torch.func.functional_call(low, names, (x,))

    assert torch.autograd.gradcheck(function, tensors)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1))
def test_a_share_of_the_numbers_is_never_exceeded(in_features, out_features, keep):
    rank = rank_for(keep, in_features, out_features)
    assert rank == 1 or rank * (in_features + out_features) <= keep * in_features * out_features * (1 + 1e-12)
    assert rank_after(rank) * (in_features + out_features) > keep * in_features * out_features * (1 - 1e-12)
    most = break_even(in_features, out_features)
    assert most * (in_features + out_features) >= in_features * out_features
    assert (most - 1) * (in_features + out_features) < in_features * out_features


def test_break_even_of_the_shapes_people_ask_about():
    assert (break_even(2048, 2048), break_even(2048, 5632)) == (1024, 1502)


def test_its_cost_is_that_of_two_thin_products():
    cost = load("lowrank", rank=64).cost(100, 512, 256, itemsize=2)
    assert cost.flops == 2 * 100 * 64 * (512 + 256)
    assert cost.bytes == 2 * (100 * 512 + 512 * 64 + 100 * 64 + 100 * 64 + 64 * 256 + 100 * 256)


def test_on_the_meta_device_only_shapes_are_made():
    with torch.device("meta"):
        low = BackendLinear(2048, 5632, bias=False, dtype=torch.bfloat16)
    low.set_backend(load("lowrank", keep=0.5))
    assert {name: tuple(each.shape) for name, each in low.named_parameters()} == {
        "weight_in": (744, 2048),
        "weight_out": (5632, 744),
    }


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank=0. Expected at least 1"),
        ({"rank": 7}, "rank=7 for a layer of 6 to 9 features. Expected at most 6; it saves numbers below 4"),
        ({"keep": 0.0}, "keep=0. Expected a share"),
        ({"keep": 1.5}, "keep=1.5. Expected a share"),
        ({"rnk": 3}, "Did you mean 'rank'"),
    ],
)
def test_what_no_layer_can_have_is_refused(options, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        layer(6, 9, bias=False).set_backend(load("lowrank", **options))
