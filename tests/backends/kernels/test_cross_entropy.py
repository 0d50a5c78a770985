"""The cross-entropy kernel without a GPU: interpreted, compiled for one that is absent, and in Inductor's plan."""

from functools import partial
from pathlib import Path

import pytest
import torch

from backends.kernels import cross_entropy
from backends.kernels.in_capture import kernels_in_capture
from benchmarks.head_kernel import head_chunk, relative
from benchmarks.step_kernels import compiled, loss
from compiled import lowering
from compiled.objective import loss_and_gradient
from tests.backends.kernels.interpreter import hopper_code, interpreted, needs_triton


@needs_triton
def test_the_interpreted_kernel_gives_the_loss_and_gradient_of_float64():
    lines = interpreted("interpreted_cross_entropy")
    assert len(lines) == 11
    for case, dtype, errors in lines:
        # the interpreter cuts the lower bits of a bfloat16 off
        bounds = {"gradient": 1e-2 if dtype == "bfloat16" else 1e-5, "logits changed": 0.0, "not finite": 0.0}
        for name, error in errors.items():
            assert error <= bounds.get(name, 1e-6), (case, dtype, errors)


@needs_triton
@pytest.mark.parametrize(("vocabulary", "terms"), [(49152, False), (32000, True), (50257, True)])
def test_the_kernel_compiles_for_hopper(vocabulary: int, terms: bool) -> None:
    kernel = cross_entropy.triton_cross_entropy.compiled_kernel()
    tile, warps, stages = cross_entropy.tiles(vocabulary)
    constants = {"VOCABULARY": vocabulary, "TILE": tile, "STAGES": stages, "SMOOTHED": terms, "PENALISED": terms}
    ptx = hopper_code(kernel, constants, {"logits": "*bf16", "labels": "*i64"}, warps)
    # an odd vocabulary has rows that do not begin at a multiple of 16 bytes
    assert ("ld.global.v4" in ptx) == (vocabulary % 8 == 0)
    assert ("st.global.v4" in ptx) == (vocabulary % 8 == 0)


@pytest.mark.parametrize(("has_kernel", "operators"), [(True, 1), (False, 0)])
def test_who_has_no_kernel_takes_plain_operators(monkeypatch, has_kernel, operators):
    monkeypatch.setattr(cross_entropy, "has_kernel", lambda *_: has_kernel)
    if has_kernel:
        pytest.importorskip("triton")
    graph = lowering.trace(
        lambda *given: loss_and_gradient(given[0], torch.float32, *given[1:], {}),
        [torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), torch.ones(4)],
    )
    ours = [node for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "substrate"]
    assert len(ours) == operators
    loss, gradient = (lowering.node_value(node) for node in graph.graph.output_node().args[0])
    assert (loss.shape, gradient.shape, gradient.dtype) == ((), (4, 9), torch.float32)


def test_wide_logits_and_other_devices_have_no_kernel():
    assert not cross_entropy.has_kernel(torch.randn(2, 3), torch.float32)
    with lowering.fake_mode():
        on_gpu = torch.empty(2, 3, device="cuda", dtype=torch.bfloat16)
    assert not cross_entropy.has_kernel(on_gpu, torch.float32)  # eager code
    with kernels_in_capture():
        assert cross_entropy.has_kernel(on_gpu, torch.float32)
        assert not cross_entropy.has_kernel(on_gpu, torch.float64)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_a_compiled_head_gives_the_gradients_of_float64(vocabulary: int, tmp_path: Path) -> None:
    rows, width = 333, 256
    torch.manual_seed(0)
    inputs = [torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for n in (rows, vocabulary)]
    labels, scale = torch.randint(0, vocabulary, (rows,), device="cuda"), torch.rand(rows, device="cuda")
    given = [*inputs, labels, scale * (torch.arange(rows, device="cuda") % 3 > 0)]
    found = compiled(head_chunk(loss), given, tmp_path)(*given)
    wide = [each.double() if each.is_floating_point() else each for each in given]
    expected = head_chunk(partial(loss, dtype=torch.float64))(*wide)
    for value, wanted in zip(found, expected, strict=True):
        assert relative(value, wanted) < 1e-2
