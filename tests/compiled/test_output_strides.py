"""Results keep their strides where the compiler pads products; on a CPU it never does, so that it is told to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.fx_passes import pad_mm

from compiled import lowering
from compiled.output_strides import has_strides_of, keeping_output_strides


@pytest.fixture
def padding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products are padded to multiples of 8, as a GPU's are where it pays."""
    for name, value in {"check_device": True, "has_triton": True, "get_alignment_size": 8}.items():
        monkeypatch.setattr(pad_mm, name, lambda *_, value=value: value, raising=False)
    monkeypatch.setattr(pad_mm, "_skip_do_bench_times", True)
    with config.patch(force_shape_pad=True, shape_padding=True):
        yield


def thin(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> tuple[Tensor, ...]:
    """x [T, 24] · [24, 13] · [13, 16]: the rank is no multiple of 8."""
    return (torch.tanh(x @ weight_in) @ weight_out,)


def fakes() -> list[Tensor]:
    with lowering.fake_mode():
        return [torch.empty(shape, requires_grad=True) for shape in ((32, 24), (24, 13), (13, 16))]


@pytest.mark.usefixtures("padding")
def test_gradients_are_dense_and_right_where_products_were_padded() -> None:
    inputs = fakes()
    with lowering.quiet_torch():
        forward, backward = lowering.split_joint(lowering.trace_joint(thin, inputs), 1)
    products = [node for node in backward.graph.nodes if node.target is torch.ops.aten.mm.default]
    assert any(16 in node.meta["val"].shape[1:] for node in products), "nothing was padded"
    gradients = [node.meta["val"] for node in backward.graph.output_node().args[0]]
    assert [gradient.stride() for gradient in gradients] == [(24, 1), (13, 1), (16, 1)]

    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(one.shape, generator=generator).requires_grad_() for one in inputs]
    grad = torch.randn(32, 16, generator=generator)
    expected = torch.autograd.grad(thin(*leaves)[0], leaves, grad)
    names = [node.name for node in forward.graph.nodes if node.op == "placeholder"]
    given = [leaf.detach() for leaf in leaves]
    saved = dict(zip([node.name for node in forward.graph.output_node().args[0]], forward(*given), strict=True))
    known = dict(zip(names, given, strict=True)) | saved
    found = backward(*(known.get(node.name, grad) for node in backward.graph.nodes if node.op == "placeholder"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.is_contiguous()


def test_only_outputs_whose_strides_change_are_copied() -> None:
    with lowering.quiet_torch():
        graph = lowering.trace(lambda x: (x * 2, x + 1), fakes()[:1])

    def pad_the_first(module: torch.fx.GraphModule) -> None:
        node = next(node for node in module.graph.nodes if node.target is torch.ops.aten.mul.Tensor)
        with lowering.fake_mode():
            node.meta["val"] = torch.empty(32, 32)[:, :24]

    keeping_output_strides(graph, pad_the_first)
    first, second = graph.graph.output_node().args[0]
    assert first.target is torch.ops.aten.clone.default
    assert second.target is torch.ops.aten.add.Tensor
    x = torch.randn(32, 24)
    assert all(map(torch.equal, graph(x), (x * 2, x + 1)))


def test_results_are_compared_with_what_the_graph_says() -> None:
    with lowering.quiet_torch():
        graph = lowering.trace(lambda x: (x * 2, x.sum().expand(3)), fakes()[:1])
    dense, slices = torch.empty(32, 24), torch.empty(32, 32)[:, :24]
    assert has_strides_of(graph, [dense, torch.empty(3)])  # an expanded number may be written out
    assert not has_strides_of(graph, [slices, torch.empty(3)])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_columns_of_a_product_keep_their_strides_on_a_gpu(tmp_path: Path) -> None:
    """1488 columns in bfloat16, as of two ranks of 744: the compiler would give the buffer rows of 1536."""

    def columns(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (x @ weight.T).split([744, 744], -1)

    with lowering.fake_mode():
        shapes = ((1024, 2048), (1488, 2048))
        inputs = [torch.empty(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    with lowering.quiet_torch():
        lowering.lower(lowering.trace(columns, inputs), inputs, "cuda", tmp_path / "region")
    generator = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(each.shape, device="cuda", dtype=each.dtype, generator=generator) for each in inputs]
    found = lowering.load(tmp_path / "region", "cuda")(list(given))
    for ours, exact in zip(found, columns(*(each.double() for each in given)), strict=True):
        assert ours.stride() == (1488, 1)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=0.5)
