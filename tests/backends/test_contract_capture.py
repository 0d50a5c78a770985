"""What every backend must hold to become part of a compiled region: fake tensors, and capture as a pure graph."""

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import backends
from backends.base import Backend
from backends.layers import BackendAttention, BackendLinear
from tests.backends.contract import GROUPS, HEAD_DIM, HEADS, IN, LENGTH, NAMES, OUT, attention_operands, returned


@pytest.fixture(params=NAMES)
def backend(request) -> Backend:
    return backends.load(request.param)


@pytest.fixture
def linear_backend(backend) -> Backend:
    if not backend.computes("linear"):
        pytest.skip("computes no linear layers")
    return backend


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
    buffers = [name for name, _ in layer.named_buffers() if name in returned(layer.state_specs)]

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
        joint = joint[0] if isinstance(joint, tuple) else joint  # older torch returns its specs too
        y, *new_state = forward(*leaves, *state)
        upstream = torch.ones_like(y)
        with torch.no_grad():
            outputs, gradients = joint([*leaves, *state], [upstream])
        torch.testing.assert_close(list(outputs), [y, *new_state], rtol=1e-6, atol=1e-6)
        expected = [*torch.autograd.grad(y, leaves, upstream), *(None for _ in state)]
        torch.testing.assert_close(list(gradients), expected, rtol=1e-6, atol=1e-6)
