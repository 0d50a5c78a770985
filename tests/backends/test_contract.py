"""What every backend, present and future, must hold. A new file in backends/ is tested here without a change."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import backends
from backends.base import Backend, StateSpec
from backends.layers import BackendAttention, BackendLinear

NAMES = [*backends.available(), "tests.backends.stateful_backend:ScaledBackend"]
IN, OUT, HEADS, GROUPS, HEAD_DIM, LENGTH = 6, 10, 4, 2, 8, 5


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


def tensors(specs: dict[str, StateSpec]) -> dict[str, Tensor]:
    return {name: torch.full(spec.shape, spec.fill, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}


def linear_operands(backend: Backend, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, object, Tensor | None]:
    """x, and weight and bias as `backend.linear` gets them from a layer."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, IN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(OUT, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    if backend.parameter_spec(IN, OUT, bias) is not None:
        return x, backend.initial_parameters(weight, b), None
    return x, weight, b


def attention_operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, HEADS, LENGTH, HEAD_DIM), (2, GROUPS, LENGTH, HEAD_DIM), (2, GROUPS, LENGTH, HEAD_DIM))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def attend(backend: Backend, q: Tensor, k: Tensor, v: Tensor, state: dict, *, mask=None, training=False):
    return backend.attention(q, k, v, mask=mask, scale=HEAD_DIM**-0.5, is_causal=True, state=state, training=training)


def calibrated(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    return attend(backend, q, k, v, tensors(backend.attention_state(HEADS, HEAD_DIM)), training=True)[1]


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


def test_linear_gradients_are_exact_or_straight_through_as_stated(linear_backend):
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


def assert_pure(compute, state: dict[str, Tensor]) -> None:
    before = {name: tensor.clone() for name, tensor in state.items()}
    first, new_state = compute(state)
    assert {n: (t.shape, t.dtype) for n, t in new_state.items()} == {n: (t.shape, t.dtype) for n, t in state.items()}
    assert all(torch.equal(state[name], before[name]) for name in state), "the given state was changed"
    again, new_again = compute(state)
    assert torch.equal(first, again)
    assert all(torch.equal(new_state[name], new_again[name]) for name in state)


def test_linear_is_a_pure_function_of_its_tensors(linear_backend):
    x, weight, bias = linear_operands(linear_backend, torch.float32)
    state = tensors(linear_backend.linear_state(IN, OUT))
    assert_pure(lambda given: linear_backend.linear(x, weight, bias, given, training=True), state)


def test_attention_is_a_pure_function_of_its_tensors(attention_backend):
    q, k, v = attention_operands()
    state = tensors(attention_backend.attention_state(HEADS, HEAD_DIM))
    assert_pure(lambda given: attend(attention_backend, q, k, v, given, training=True), state)


# ---- fake tensors and capture ----------------------------------------------------------------------------------


def test_layers_run_on_fake_tensors(backend):
    with FakeTensorMode():
        if backend.computes("linear"):
            linear = BackendLinear(IN, OUT)
            linear.set_backend(backend)
            assert linear(torch.empty(2, 3, IN)).shape == (2, 3, OUT)
        if backend.computes("attention"):
            attention = BackendAttention(HEADS, HEAD_DIM)
            attention.set_backend(backend)
            q, k = torch.empty(2, HEADS, LENGTH, HEAD_DIM), torch.empty(2, GROUPS, LENGTH, HEAD_DIM)
            assert attention.attend(q, k, k, mask=None, scale=1.0).shape == q.shape


def test_a_layer_on_the_meta_device_routes_without_memory(linear_backend):
    layer = BackendLinear(IN, OUT, device="meta")
    layer.set_backend(linear_backend)
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert layer(torch.empty(3, IN, device="meta")).shape == (3, OUT)


class Attention(BackendAttention):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # As in a model something follows: a region cannot return a view of what it computed.
        return 2 * self.attend(q, k, v, mask=None, scale=HEAD_DIM**-0.5)


def example_layers(backend: Backend):
    if backend.computes("linear"):
        linear = BackendLinear(IN, OUT)
        linear.set_backend(backend)
        yield linear, [torch.randn(3, IN)]
    if backend.computes("attention"):
        attention = Attention(HEADS, HEAD_DIM)
        attention.set_backend(backend)
        yield attention, list(attention_operands())


def region(layer: torch.nn.Module, num_inputs: int):
    """A layer as a function (inputs…, parameters…, state…) → (y, new state…), as a compiled region wants it."""
    names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    buffers = [name for name, _ in layer.named_buffers()]

    def forward(*flat: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(names, flat[num_inputs:], strict=True))
        with backends.collect_state() as collected:
            y = torch.func.functional_call(layer, values, flat[:num_inputs])
        new_state = collected.named(layer)
        return (y, *(new_state[name] for name in buffers))

    return forward


def training_step(forward):
    """(leaves, state) → y, new state… and the gradient of y² with respect to every leaf."""

    def step(leaves: list[Tensor], state: list[Tensor]) -> list[Tensor]:
        y, *new_state = forward(*leaves, *state)
        return [y, *new_state, *torch.autograd.grad(y.square().sum(), leaves)]

    return step


def region_arguments(layer: torch.nn.Module, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh copies of what gradients are taken for, and of the state."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, *layer.parameters())]
    return leaves, [buffer.clone() for buffer in layer.buffers()]


def test_a_training_step_is_captured_as_a_graph_without_constants(backend):
    for layer, inputs in example_layers(backend):
        step = training_step(region(layer, len(inputs)))
        leaves, state = region_arguments(layer, inputs)
        graph = make_fx(step, tracing_mode="fake")(leaves, state)
        baked_in = [node for node in graph.graph.nodes if node.op == "get_attr"]
        assert not baked_in, "a tensor of the layer became a constant of the graph"
        other_state = [tensor + 1 for tensor in state]
        torch.testing.assert_close(graph(leaves, other_state), step(leaves, other_state), rtol=0, atol=0)


def test_the_joint_graph_of_a_region_returns_output_state_and_gradients(backend):
    for layer, inputs in example_layers(backend):
        forward = region(layer, len(inputs))
        leaves, state = region_arguments(layer, inputs)
        joint = aot_export_joint_simple(forward, (*leaves, *state), trace_joint=True)
        y, *new_state = forward(*leaves, *state)
        upstream = torch.ones_like(y)
        with torch.no_grad():
            outputs, gradients = joint([*leaves, *state], [upstream])
        torch.testing.assert_close(list(outputs), [y, *new_state], rtol=1e-6, atol=1e-6)
        expected = [*torch.autograd.grad(y, leaves, upstream), *(None for _ in state)]
        torch.testing.assert_close(list(gradients), expected, rtol=1e-6, atol=1e-6)


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
