"""What every backend, present and future, must hold. A new file in backends/ is tested here without a change."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import backends
from backends.base import Backend, StateSpec
from tests.backends.contract import (
    HEAD_DIM,
    HEADS,
    IN,
    LENGTH,
    NAMES,
    OUT,
    attend,
    attention_operands,
    calibrated,
    linear_operands,
    returned,
    tensors,
)


@pytest.fixture(params=NAMES)
def backend(request) -> Backend:
    return backends.load(request.param)


@pytest.fixture
def linear_backend(backend) -> Backend:
    if not backend.computes("linear"):
        pytest.skip("computes no linear layers")
    return backend


@pytest.fixture
def attention_backend(backend) -> Backend:
    if not backend.computes("attention"):
        pytest.skip("computes no attention")
    return backend


# ---- shapes and dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_linear_keeps_leading_dimensions_and_dtype(linear_backend, dtype, bias, leading):
    x, weight, b = linear_operands(linear_backend, dtype, bias)
    x = x[0].expand(*leading, IN)
    y, _ = linear_backend.linear(x, weight, b, tensors(linear_backend.linear_state(IN, OUT)), training=True)
    assert y.shape == (*leading, OUT)
    assert y.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_with_grouped_heads_has_the_shape_and_dtype_of_q(attention_backend, dtype):
    q, k, v = attention_operands(dtype)
    state = tensors(attention_backend.attention_state(HEADS, HEAD_DIM))
    out, _ = attend(attention_backend, q, k, v, state, training=True)
    assert out.shape == q.shape
    assert out.dtype == dtype


# ---- gradients -------------------------------------------------------------------------------------------------


def test_linear_gradients_are_exact_straight_through_or_rounded_as_stated(linear_backend):
    x, weight, bias = linear_operands(linear_backend, torch.float64)
    state = tensors(linear_backend.linear_state(IN, OUT))
    named = {"x": x, **(weight if isinstance(weight, dict) else {"weight": weight, "bias": bias})}
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in named.items()}

    def compute(*operands: Tensor) -> Tensor:
        given = dict(zip(leaves, operands, strict=True))
        stored = {name: tensor for name, tensor in given.items() if name != "x"}
        w, b = (stored, None) if isinstance(weight, dict) else (stored["weight"], stored["bias"])
        return linear_backend.linear(given["x"], w, b, state, training=True)[0]

    if linear_backend.gradient == "exact":
        assert torch.autograd.gradcheck(compute, tuple(leaves.values()))
        return
    upstream = torch.linspace(-1, 1, 3 * OUT, dtype=torch.float64).view(3, OUT)
    got = torch.autograd.grad(compute(*leaves.values()), tuple(leaves.values()), upstream)
    plain = torch.autograd.grad(F.linear(*leaves.values()), tuple(leaves.values()), upstream)
    if linear_backend.gradient == "rounded":
        for mine, expected in zip(got, plain, strict=True):
            assert (mine - expected).norm() < 0.1 * expected.norm()
        return
    torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-12)


def test_matmul_gradients_are_exact_or_straight_through_as_stated(attention_backend):
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 2, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    state = tensors(attention_backend.matmul_state())

    def compute(a: Tensor, b: Tensor) -> Tensor:
        return attention_backend.matmul(a, b, state, training=True)[0]

    if attention_backend.gradient == "exact":
        assert torch.autograd.gradcheck(compute, (a, b))
        return
    upstream = torch.linspace(-1, 1, 60, dtype=torch.float64).view(2, 2, 3, 5)
    got = torch.autograd.grad(compute(a, b), (a, b), upstream)
    torch.testing.assert_close(got, torch.autograd.grad(a @ b, (a, b), upstream), rtol=1e-12, atol=1e-12)


def test_attention_of_an_exact_backend_passes_gradcheck(attention_backend):
    if attention_backend.gradient != "exact":
        pytest.skip("its products are checked one by one")
    operands = tuple(x.requires_grad_() for x in attention_operands(torch.float64))
    state = tensors(attention_backend.attention_state(HEADS, HEAD_DIM))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(attention_backend, q, k, v, state)[0], operands)


# ---- attention sees what it may --------------------------------------------------------------------------------


def test_causal_attention_does_not_see_the_future(attention_backend):
    q, k, v = attention_operands()
    state = calibrated(attention_backend, q, k, v)
    before, _ = attend(attention_backend, q, k, v, state)
    k[:, :, -1] += 0.5
    v[:, :, -1] -= 0.5
    after, _ = attend(attention_backend, q, k, v, state)
    torch.testing.assert_close(after[:, :, :-1], before[:, :, :-1], rtol=0, atol=0)
    assert not torch.equal(after[:, :, -1], before[:, :, -1])


def test_masked_attention_sees_only_what_the_mask_allows(attention_backend):
    q, k, v = attention_operands()
    state = calibrated(attention_backend, q, k, v)
    articles = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 2]])
    mask = (articles[:, None, :, None] == articles[:, None, None, :]) & torch.ones(LENGTH, LENGTH).tril().bool()
    before, _ = attend(attention_backend, q, k, v, state, mask=mask)
    k[0, :, 0] += 0.5
    v[0, :, 0] -= 0.5
    after, _ = attend(attention_backend, q, k, v, state, mask=mask)
    torch.testing.assert_close(after[0, :, 2:], before[0, :, 2:], rtol=0, atol=0)
    assert not torch.equal(after[0, :, :2], before[0, :, :2])


# ---- state goes in and comes out -------------------------------------------------------------------------------


def assert_pure(compute, specs: dict[str, StateSpec]) -> None:
    state = tensors(specs)
    before = {name: tensor.clone() for name, tensor in state.items()}
    first, new_state = compute(state)
    expected = {name: (state[name].shape, state[name].dtype) for name in returned(specs)}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in new_state.items()} == expected
    assert all(torch.equal(state[name], before[name]) for name in state), "the given state was changed"
    again, new_again = compute(state)
    assert torch.equal(first, again)
    assert all(torch.equal(new_state[name], new_again[name]) for name in expected)


def test_linear_is_a_pure_function_of_its_tensors(linear_backend):
    x, weight, bias = linear_operands(linear_backend, torch.float32)
    specs = linear_backend.linear_state(IN, OUT)
    assert_pure(lambda given: linear_backend.linear(x, weight, bias, given, training=True), specs)


def test_attention_is_a_pure_function_of_its_tensors(attention_backend):
    q, k, v = attention_operands()
    specs = attention_backend.attention_state(HEADS, HEAD_DIM)
    assert_pure(lambda given: attend(attention_backend, q, k, v, given, training=True), specs)


def test_a_backend_of_the_house_without_state_computes_the_same_in_training(linear_backend):
    """So that a block of such needs no second graph to be evaluated by (compiled/schedule.py)."""
    if linear_backend.linear_state(IN, OUT) or ":" in linear_backend.name:
        pytest.skip("it keeps state, or is from outside, where both graphs are compared")
    x, weight, bias = linear_operands(linear_backend, torch.float32)
    both = [linear_backend.linear(x, weight, bias, {}, training=training)[0] for training in (False, True)]
    assert torch.equal(*both)


# ---- identity --------------------------------------------------------------------------------------------------


def test_equal_backends_are_equal_hash_alike_and_share_a_fingerprint(backend):
    twin = backends.load(backend.name, **backend.options())
    assert twin == backend
    assert hash(twin) == hash(backend)
    assert twin.fingerprint() == backend.fingerprint()
    assert pickle.loads(pickle.dumps(backend)) == copy.deepcopy(backend) == backend


def test_the_config_is_frozen_and_every_option_has_a_default(backend):
    assert type(backend)().config == backend.config
    assert type(backend.config).__dataclass_params__.frozen
    for field in dataclasses.fields(backend.config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(backend.config, field.name, None)


def test_cost_is_positive_and_grows_with_the_product(backend):
    small, large = backend.cost(8, 16, 32), backend.cost(80, 16, 32)
    assert 0 < small.flops < large.flops
    assert 0 < small.bytes < large.bytes
    assert (small.joules is None) or (0 < small.joules < large.joules)
