"""RMSNorm's backward kernel without a GPU: interpreted, compiled for one that is absent, and in a captured graph."""

import pytest
import torch
from torch import Tensor

from backends.kernels import in_capture, rms_norm
from compiled import lowering
from tests.backends.kernels.interpreter import hopper_code, interpreted, needs_triton

BF16 = dict.fromkeys(("grad_normed", "grad_residual", "x", "weight", "grad_x"), "*bf16")


@needs_triton
def test_the_interpreted_kernel_gives_the_gradients_of_float64():
    lines = interpreted("interpreted_rms_norm")
    assert len(lines) == 7
    for case, dtype, errors in lines:
        for error in errors.values():
            assert error < (1e-2 if dtype == "bfloat16" else 1e-6), (case, dtype, errors)


@needs_triton
@pytest.mark.parametrize("width", [384, 2048, 4096])
def test_the_kernel_compiles_for_hopper(width: int) -> None:
    rows, warps, _, stages = rms_norm.tiles(width)
    block = 1 << (width - 1).bit_length()
    constants = {"WIDTH": width, "ROWS": rows, "BLOCK": block, "STAGES": stages, "RESIDUAL": True, "WEIGHT": True}
    kinds = BF16 | {"num_rows": "i32"}
    ptx = hopper_code(rms_norm.triton_rms_norm.compiled_kernel(), constants, kinds, warps)
    assert "ld.global.v4" in ptx or "cp.async" in ptx
    assert "st.global.v4" in ptx


def block(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (x + rms_norm.rms_norm(x, weight, 1e-6, torch.float32, torch.float32).sin(),)


def backward_operators(monkeypatch: pytest.MonkeyPatch, function=block) -> list[torch.fx.Node]:
    """The norm's operators in the joint graph of a function, as if the CPU were a GPU."""
    monkeypatch.setattr(rms_norm, "takes_kernels", lambda _: bool(in_capture._captures))
    with lowering.fake_mode():
        inputs = [torch.empty(2, 3, 8, requires_grad=True), torch.empty(8, requires_grad=True)]
    graph = lowering.trace_joint(function, inputs)
    operators = [node for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "substrate"]
    shapes = [node.meta["val"].shape for node in graph.graph.output_node().args[0][1:]]
    assert shapes == [(2, 3, 8), (8,)]
    return operators


@needs_triton
def test_a_residual_gradient_is_added_inside_the_operator(monkeypatch):
    (operator,) = backward_operators(monkeypatch)
    assert operator.args[1] is not None
    targets = [node.target for node in operator.graph.nodes]
    assert targets.count(torch.ops.aten.add.Tensor) == 2  # epsilon, and the forward's own sum


@needs_triton
@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight: (rms_norm.rms_norm(x, weight, 1e-6, torch.float32, torch.float32).sin(),),  # no residual
        # its gradient is made of the norm's, and nothing can be added before
        lambda x, weight: (rms_norm.rms_norm(x.sin() * x, weight, 1e-6, torch.float32, torch.float32),),
    ],
)
def test_no_other_gradient_is(monkeypatch, function):
    (operator,) = backward_operators(monkeypatch, function)
    assert operator.args[1] is None


def test_eager_code_and_other_devices_have_no_kernel():
    with lowering.fake_mode():
        on_gpu = torch.empty(2, 3, device="cuda", dtype=torch.bfloat16)
    assert not in_capture.takes_kernels(on_gpu)
    with in_capture.kernels_in_capture():
        assert in_capture.takes_kernels(on_gpu)
        assert not in_capture.takes_kernels(torch.empty(2, 3))
    assert not in_capture.takes_kernels(on_gpu)
