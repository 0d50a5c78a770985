import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backends
from backends.base import Backend
from backends.errors import UserError
from backends.layers import BackendAttention, BackendLinear
from tests.backends.stateful_backend import ScaledBackend


class Factored(Backend):
    """Stores W as the product of two full-rank factors: other parameters, the same numbers."""

    def linear(self, x, weight, bias, state, *, training=False):
        return F.linear(F.linear(x, weight["first"]), weight["second"], weight.get("shift")), state

    def parameter_spec(self, in_features, out_features, bias):
        rank = min(in_features, out_features)
        spec = {"first": (rank, in_features), "second": (out_features, rank)}
        return spec | ({"shift": (out_features,)} if bias else {})

    def initial_parameters(self, weight, bias):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        factors = {"first": s.sqrt()[:, None] * vh, "second": u * s.sqrt()}
        return factors | ({} if bias is None else {"shift": bias})


# ---- BackendLinear ---------------------------------------------------------------------------------------------


def test_it_is_nn_linear_bit_for_bit_by_default():
    torch.manual_seed(0)
    plain = nn.Linear(8, 5)
    torch.manual_seed(0)
    layer = BackendLinear(8, 5)
    x = torch.randn(3, 8)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer(x), plain(x))


def test_layers_of_equal_configuration_have_equal_plain_attributes():
    def plain_attributes(layer):
        return {name: value for name, value in vars(layer).items() if not name.startswith("_")}

    one, two = BackendLinear(8, 5), BackendLinear(8, 5)
    for layer in (one, two):
        layer.set_backend(backends.load("tests.backends.stateful_backend:ScaledBackend", levels=16))
    two(torch.randn(3, 8))
    assert plain_attributes(one) == plain_attributes(two)
    two.set_backend(ScaledBackend(ScaledBackend.Config(levels=8)))
    assert plain_attributes(one) != plain_attributes(two)


def test_compute_dtype_applies_to_input_weight_and_bias_but_not_to_what_is_stored():
    layer = BackendLinear(8, 5)
    layer.compute_dtype = torch.bfloat16
    x = torch.randn(3, 8)
    y = layer(x)
    assert torch.equal(y, F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16()))
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


def test_adopting_a_linear_keeps_the_object_its_weights_and_its_hooks():
    linear = nn.Linear(8, 5)
    seen = []
    linear.register_forward_hook(lambda *_: seen.append(True))
    weight, x = linear.weight, torch.randn(3, 8)
    expected = linear(x)
    layer = BackendLinear.adopt(linear)
    assert layer is linear
    assert layer.weight is weight
    assert torch.equal(layer(x), expected)
    assert seen == [True, True]


def test_copies_and_pickles_compute_the_same():
    layer = BackendLinear.adopt(nn.Linear(8, 5))
    x = torch.randn(3, 8)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
        assert twin.backend == layer.backend


def test_a_stateless_backend_allocates_nothing():
    layer = BackendLinear(8, 5)
    weight = layer.weight
    layer.set_backend(backends.load("dense"))
    assert layer.weight is weight
    assert not list(layer.buffers())


def test_a_product_of_another_shape_is_told_with_the_backend_that_made_it():
    """Without the check a key projection as wide as its input goes unnoticed: it is seen as more heads."""

    class Lazy(Backend):
        def linear(self, x, weight, bias, state, *, training=False):
            return x, state

        def attention(self, q, k, v, *, mask, scale, is_causal, state, training=False):
            return k, state

    layer = BackendLinear(8, 4)
    layer.set_backend(Lazy())
    with pytest.raises(UserError, match=r"linear of backend .*returned \[2, 3, 8\]\. Expected \[2, 3, 4\]"):
        layer(torch.randn(2, 3, 8))
    attention = BackendAttention(2, 4)
    attention.set_backend(Lazy())
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4)
    with pytest.raises(UserError, match=r"attention of backend .*Expected \[1, 2, 3, 4\]"):
        attention.attend(q, k, k, mask=None, scale=1.0)


def test_the_text_of_a_layer_names_its_backend():
    assert "in_features=8, out_features=5, bias=True, backend=dense" in str(BackendLinear(8, 5))


# ---- a backend that stores other parameters than W -------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_stores_what_its_backend_asks_for(bias):
    layer = BackendLinear(8, 5, bias=bias)
    x = torch.randn(3, 8)
    expected = layer(x)
    layer.set_backend(Factored())
    assert set(layer.state_dict()) == {"first", "second"} | ({"shift"} if bias else set())
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_stored_factors_follow_the_compute_dtype_and_load_from_a_state_dict():
    layer, twin = BackendLinear(8, 5), BackendLinear(8, 5, device="meta")
    for one in (layer, twin):
        one.set_backend(Factored())
        one.compute_dtype = torch.bfloat16
    assert twin.first.is_meta
    twin.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), twin(x))
    assert layer(x).dtype == torch.bfloat16


def test_frozen_weights_give_frozen_factors():
    layer = BackendLinear(8, 5).requires_grad_(False)
    layer.set_backend(Factored())
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_factored_layer_takes_its_own_backend_again_but_no_other():
    layer = BackendLinear(8, 5)
    layer.set_backend(Factored())
    first = layer.first
    layer.set_backend(Factored())
    assert layer.first is first
    with pytest.raises(UserError, match="already stores first, second, shift"):
        layer.set_backend(backends.load("dense"))


# ---- BackendAttention ------------------------------------------------------------------------------------------


def test_attend_is_sdpa_by_default():
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    out = BackendAttention(4, 8).attend(q, k, v, mask=None, scale=0.3)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3))


def test_attention_keeps_state_for_each_product():
    attention = BackendAttention(4, 8)
    attention.set_backend(ScaledBackend())
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    attention.attend(q, k, v, mask=None, scale=0.3)
    assert attention.scores_max_abs == q.abs().max()
    assert attention.scores_step == attention.values_step == 1


def test_attention_computes_in_the_compute_dtype():
    attention = BackendAttention(4, 8)
    attention.compute_dtype = torch.bfloat16
    q, k, v = torch.randn(3, 2, 4, 5, 8).unbind()
    assert attention.attend(q, k, v, mask=None, scale=0.3).dtype == torch.bfloat16


def test_the_state_of_attention_lies_where_its_projections_do():
    attention = BackendAttention(4, 8)
    attention.q_proj = BackendLinear(32, 32, device="meta")
    attention.set_backend(ScaledBackend())
    assert attention.scores_max_abs.is_meta


# ---- dropped attention weights -----------------------------------------------------------------------------------


def test_weights_are_changed_behind_the_softmax_and_in_training_only():
    torch.manual_seed(0)
    layer = BackendAttention(4, 8)
    q, k, v = torch.randn(2, 4, 6, 8).double(), torch.randn(2, 2, 6, 8).double(), torch.randn(2, 2, 6, 8).double()
    factors = (torch.rand(2, 4, 6, 6) < 0.7).double() / 0.7
    drop = factors.__mul__
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    values = v.repeat_interleave(2, 1)
    torch.testing.assert_close(layer.attend(q, k, v, mask=None, scale=0.3, drop=drop), (weights * factors) @ values)
    torch.testing.assert_close(layer.eval().attend(q, k, v, mask=None, scale=0.3, drop=drop), weights @ values)


def test_a_backend_without_weights_to_drop_is_refused_in_training():
    layer = BackendAttention(2, 4)
    layer.set_backend(backends.load("optical"))
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(UserError, match=r"computes attention in one piece.*model\.attention_dropout=0"):
        layer.attend(q, q, q, mask=None, scale=0.5, drop=lambda weights: weights)
