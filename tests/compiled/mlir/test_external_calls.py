"""A backend's product as a call: what the module declares, who gives the gradients, and that nothing else changes."""

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, State
from backends.kernels.external import ExternalCalls, computed_by, external_calls
from backends.optical import Optical
from compiled import lowering as inductor
from compiled.mlir.external_calls import attributes_text
from compiled.mlir.importing import module_text, pure_graph
from compiled.mlir.isolation import Limits
from compiled.mlir.lowering import lower_regions
from tests.compiled.mlir.conftest import Capture

pytest.importorskip("torch_mlir", reason="the extra [mlir] is not installed")


class Analog(Backend):
    """A product that another program has; gradients are asked of it too."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        levels: int = 16
        gain: float = 0.5
        table: str | None = None

    config: Config

    def mlir_function(self) -> str:
        return "analog"

    def linear(self, x: Tensor, weight: Any, bias: Any, state: State, *, training: bool = False) -> Any:
        return F.linear(x, weight, bias) * self.config.gain, state

    def matmul(self, a: Tensor, b: Tensor, state: State, *, training: bool = False) -> tuple[Tensor, State]:
        return a @ b * self.config.gain, state


class Lens(Optical):
    """State goes in and comes out; gradients are those of the plain product."""

    def mlir_function(self) -> str:
        return "lens"


def rule(backend: type[Backend], match: str) -> str:
    return f"backend.rules=[{{match: '{match}', use: '{__name__}:{backend.__name__}'}}]"


def declared(text: str) -> dict[str, str]:
    return dict(re.findall(r"func\.func private @(\w+)(\(.*)", text))


@pytest.mark.parametrize("dialect", ["linalg", "stablehlo", "tosa", "torch"])
def test_a_product_is_a_call_with_the_config_as_attributes(capture: Capture, dialect: str) -> None:
    step = capture(rule(Analog, "*.down_proj"), "optimizer=sgdm", num_hidden_layers=1)
    names = ("block_0_forward", "block_0_backward")
    modules = lower_regions({name: step.regions[name] for name in names}, dialect, Limits(60, 8), 2)  # type: ignore[arg-type]
    forward, backward = (modules[name].value.decode() for name in names)
    kind = "!torch.vtensor<[{}],f32>" if dialect == "torch" else "tensor<{}xf32>"
    x, weight, y = (
        kind.format(shape.replace("x", "," if dialect == "torch" else "x")) for shape in ("2x16x48", "32x48", "2x16x32")
    )
    options = "{config = {gain = 5.000000e-01 : f64, levels = 16 : i64}"
    assert declared(forward)["analog"].startswith(f"({x}, {weight}) -> {y} attributes {{substrate.call = {options}")
    assert 'operands = ["x", "weight"], product = "linear", training = true' in declared(forward)["analog"]
    assert declared(backward)["analog_backward"].startswith(f"({x}, {weight}, {y}) -> ({x}, {weight})")
    assert len(re.findall(r"call @analog\(", forward)) == len(re.findall(r"call @analog_backward\(", backward)) == 1


def test_state_and_plain_gradients(capture: Capture) -> None:
    """A straight-through backend's backward holds standard operators only, for its linear layers."""
    step = capture(rule(Lens, "*.down_proj"), "optimizer=sgdm", num_hidden_layers=1)
    modules = lower_regions(
        {name: step.regions[name] for name in ("block_0_forward", "block_0_backward")}, "linalg", Limits(60, 8), 2
    )
    (call,) = declared(modules["block_0_forward"].value.decode()).values()
    arguments, results = call.split(" attributes ")[0].split(" -> ")
    assert arguments.count("tensor<f32>") == results.count("tensor<f32>") == 6
    assert (arguments.count("tensor<i64>"), results.count("tensor<i64>")) == (3, 1)
    assert "q_levels = 256" in call
    assert not declared(modules["block_0_backward"].value.decode())


def test_gradients_of_a_plain_product_are_those_of_the_product() -> None:
    """The traced backward, run: dX = dY W, dW = dYᵀ X, db = Σ dY."""
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    backend = ExternalCalls(Lens(Lens.Config(q_bypass=True)))

    def step(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
        with torch.enable_grad():
            y, _ = backend.linear(*leaves, {}, training=True)
            return torch.autograd.grad(y, leaves, grad)

    grad = torch.randn(2, 3, 5)
    with inductor.fake_mode():
        fakes = [torch.empty(each.shape) for each in (x, weight, bias, grad)]
    graph = inductor.trace(step, fakes)
    assert "external_call" not in graph.code
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias)]
    F.linear(*leaves).backward(grad)
    for found, leaf in zip(graph(x, weight, bias, grad), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad)


def test_two_options_are_two_declarations_and_equal_calls_share_one() -> None:
    def step(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        one, other = ExternalCalls(Analog()), ExternalCalls(Analog(Analog.Config(levels=4)))
        y, _ = one.linear(x, weight, None, {})
        z, _ = one.linear(y, weight, None, {})
        return other.linear(z, weight, None, {})[:1]

    text = module_text(pure_graph(step, [torch.zeros(3, 4), torch.zeros(4, 4)], ()), "linalg").decode()
    assert sorted(declared(text)) == ["analog", "analog_1"]
    assert ("levels = 16" in declared(text)["analog"], "levels = 4 " in declared(text)["analog_1"]) == (True, True)
    assert re.findall(r"call @(\w+)", text) == ["analog", "analog", "analog_1"]


def test_outside_of_a_trace_for_mlir_the_backend_computes() -> None:
    backend = Analog()
    assert computed_by(backend) is backend
    with external_calls():
        assert isinstance(computed_by(backend), ExternalCalls)
    assert computed_by(backend) is backend


def test_attributes_are_written_as_mlir_reads_them() -> None:
    from torch_mlir.ir import Attribute, Context

    value = {"a": 1, "b": [0.5, True, 'q"uote'], "c": None, "d": {"e": "é"}}
    with Context():
        parsed = Attribute.parse(attributes_text(value))
        assert str(parsed) == '{a = 1 : i64, b = [5.000000e-01, true, "q\\22uote"], d = {e = "\\C3\\A9"}}'
