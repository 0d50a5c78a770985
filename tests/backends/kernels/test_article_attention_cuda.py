"""On a GPU: article attention against float64 with a dense mask, alone and in captured and compiled regions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends.articles import article_spans, mask_of_spans
from backends.kernels import article_attention as kernels
from benchmarks.article_attention import relative
from tests.backends.kernels.article_reference import masked_attention

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def inputs(
    heads: int, groups: int, tokens: int, head_dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[list[Tensor], Tensor, Tensor]:
    """q, k, v; a gradient of the output; spans."""
    torch.manual_seed(heads + tokens)
    made = [
        torch.randn(2, tokens, number, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
        for number in (heads, groups, groups, heads)
    ]
    opens = torch.rand(2, tokens, device="cuda") < 0.01
    return [each.requires_grad_() for each in made[:3]], made[3], article_spans(opens.cumsum(1))


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    return kernels.article_attention(q, k, v, spans, q.shape[-1] ** -0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "groups", "tokens", "head_dim"),
    [(8, 1, 512, 64), (4, 4, 333, 64), (6, 1, 201, 128), (28, 4, 700, 128), (16, 1, 130, 64), (2, 2, 1, 64)],
)
def test_output_and_gradients_are_those_of_float64(
    heads: int, groups: int, tokens: int, head_dim: int, dtype: torch.dtype
) -> None:
    given, grad, spans = inputs(heads, groups, tokens, head_dim, dtype)
    out = attend(*given, spans)
    wide = [each.detach().double().requires_grad_() for each in given]
    expected = masked_attention(*wide, mask_of_spans(spans), head_dim**-0.5)
    assert relative(out, expected) < 5e-3
    found = torch.autograd.grad(out, given, grad)
    for value, wanted in zip(found, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        assert value.dtype == dtype
        assert relative(value, wanted) < 1e-2 or wanted.abs().max() < 1e-6


def test_two_runs_give_the_same_bits() -> None:
    given, grad, spans = inputs(8, 2, 777, 64)
    first, second = ([out := attend(*given, spans), *torch.autograd.grad(out, given, grad)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_compiled_regions_give_what_the_operators_give(tmp_path: Path) -> None:
    from compiled import lowering

    given, grad, spans = inputs(8, 2, 333, 64)
    with lowering.fake_mode():
        fakes = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda", requires_grad=x.requires_grad)
            for x in (*given, spans)
        ]
    with lowering.quiet_torch():
        joint = lowering.trace_joint(lambda *x: (attend(*x),), fakes)
        forward, backward = lowering.split_joint(joint, 1)
    out = attend(*given, spans)
    tensors = [each.detach() for each in (*given, spans)]
    results = run(forward, tensors, tmp_path / "forward")
    assert torch.equal(results[0], out)
    saved = dict(zip([each.name for each in forward.graph.output_node().args[0]], results, strict=True))
    saved |= dict(zip([each.name for each in forward.graph.find_nodes(op="placeholder")], tensors, strict=True))
    names = [each.name for each in backward.graph.find_nodes(op="placeholder")]
    found = run(backward, [saved.get(name, grad) for name in names], tmp_path / "backward")
    for value, wanted in zip(found, torch.autograd.grad(out, given, grad), strict=False):
        assert torch.equal(value, wanted)


def run(graph: torch.fx.GraphModule, tensors: list[Tensor], path: Path) -> list[Tensor]:
    from compiled import lowering

    with lowering.quiet_torch():
        lowering.lower(graph, tensors, "cuda", path)
    return list(lowering.load(path, "cuda")(tensors))
