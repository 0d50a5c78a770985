"""Products given to oneDNN are the products of the graph, in every layout a train step has."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from compiled import lowering
from compiled.lowering_products import any_weight, give_to_onednn

ONEDNN = torch.ops.mkldnn._linear_pointwise.default
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def products(x: Tensor, weight: Tensor, grad: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Forward, with and without bias, both gradients, and a product of a row that is repeated."""
    ends = (bias.expand(weight.shape[0], -1)[:, : weight.shape[0]] @ weight,)
    return (x @ weight.t(), torch.addmm(bias, x, weight.t()), grad @ weight, grad.t() @ x, *ends)


def random_inputs(tokens: int, inner: int, outer: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, inner), (outer, inner), (tokens, outer), (outer,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def traced(inputs: list[Tensor]) -> torch.fx.GraphModule:
    mode = lowering.fake_mode()
    return lowering.trace(products, [mode.from_tensor(tensor) for tensor in inputs])


# tokens few and many: the weight's gradient is taken straight, or turned
@pytest.mark.parametrize(("tokens", "inner", "outer"), [(96, 24, 16), (48, 32, 200), (8, 24, 16), (1, 24, 16)])
def test_the_graph_computes_the_same_products(tokens: int, inner: int, outer: int) -> None:
    inputs = random_inputs(tokens, inner, outer)
    graph = traced(inputs)
    given = give_to_onednn(graph)
    expected = products(*(tensor.double() for tensor in inputs))
    for ours, theirs, before in zip(given(*inputs), expected, graph(*inputs), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
        assert ours.stride() == before.stride()


def test_float32_products_go_and_everything_else_stays() -> None:
    graph = traced(random_inputs(8, 24, 16))
    given = give_to_onednn(graph)
    count = len(given.graph.find_nodes(op="call_function", target=ONEDNN))
    assert count == 4  # the repeated row has no layout that oneDNN takes
    assert not graph.graph.find_nodes(op="call_function", target=ONEDNN)  # the graph itself is as it was
    wide = give_to_onednn(traced(random_inputs(8, 24, 16, torch.float64)))
    assert not wide.graph.find_nodes(op="call_function", target=ONEDNN)


def test_machine_code_calls_onednn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "float32_library", lambda: "onednn")
    inputs = random_inputs(48, 32, 200)
    mode = lowering.fake_mode()
    fakes = [mode.from_tensor(tensor) for tensor in inputs]
    lowering.lower(lowering.trace(products, fakes), fakes, "cpu", tmp_path / "region")
    assert b"linear_pointwise" in (tmp_path / "region").read_bytes()
    outputs = lowering.load(tmp_path / "region", "cpu")(inputs)
    for ours, theirs in zip(outputs, products(*(tensor.double() for tensor in inputs)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def followed(x: Tensor, weight: Tensor, grad: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Products with what Inductor makes one call of with them: activations, and sums, as of a head's chunks."""
    y = x @ weight.t()
    sums = (grad + x @ weight.t(), weight + grad.t() @ x, (y + bias).relu() + grad, y - grad, torch.relu(y * 1 + grad))
    return (F.silu(x @ weight.t()), F.gelu(y), torch.sigmoid(grad @ weight), F.leaky_relu(y, 0.3), *sums)


@pytest.mark.parametrize(("tokens", "inner", "outer"), [(96, 24, 16), (48, 32, 200)])
def test_machine_code_of_products_with_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, inner: int, outer: int
) -> None:
    monkeypatch.setattr(lowering, "float32_library", lambda: "onednn")
    inputs = random_inputs(tokens, inner, outer)
    mode = lowering.fake_mode()
    fakes = [mode.from_tensor(tensor) for tensor in inputs]
    lowering.lower(lowering.trace(followed, fakes), fakes, "cpu", tmp_path / "region")
    outputs = lowering.load(tmp_path / "region", "cpu")(inputs)
    for ours, theirs in zip(outputs, followed(*(tensor.double() for tensor in inputs)), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_inductors_own_rule_is_back_afterwards() -> None:
    from torch._inductor.lowering import lowerings

    before = lowerings[ONEDNN]
    with any_weight():
        assert lowerings[ONEDNN] is not before
    assert lowerings[ONEDNN] is before
