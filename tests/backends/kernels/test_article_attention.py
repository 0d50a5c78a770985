"""Article attention's kernels without a GPU: interpreted, compiled for one that is absent, and in a captured graph."""

from typing import Any

import pytest
import torch
from torch import Tensor

from backends.kernels import article_attention as kernels
from backends.kernels import in_capture
from compiled import lowering
from compiled.flops import count_flops
from tests.backends.kernels.interpreter import interpreted, needs_triton


@needs_triton
def test_interpreted_kernels_compute_what_a_dense_mask_does_in_float64():
    lines = interpreted("interpreted_article_attention")
    assert len(lines) == 20
    for case, errors in lines:
        assert max(errors.values()) < 1e-5, (case, errors)


KERNELS = {
    "article_forward_kernel": kernels.forward_tiles,
    "article_grad_query_kernel": kernels.grad_query_tiles,
    "article_grad_key_kernel": kernels.grad_key_tiles,
}
POINTERS = {"articles": "i32", "logsums": "fp32", "deltas": "fp32"}  # the others hold bfloat16


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("sizes", ["numbers", "constants"])
def test_kernels_compile_for_hopper_with_sizes_given_either_way(name: str, head_dim: int, sizes: str) -> None:
    """Inductor gives sizes as constants when it asks which tensors a kernel writes, later as numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels.register()
    kernel, tiles = getattr(kernels, name), KERNELS[name](head_dim)
    constants = {"PLAIN_SCALE": 0.125, "SCALE": 0.18, "UNITS": 4, "GROUPS": 4, "PACK": 8, "D": head_dim}
    constants |= {"ROWS": tiles.rows, "COLS": tiles.keys, "SPLIT": tiles.split}
    signature: dict[str, str] = {}
    given: dict[str, Any] = {}
    for parameter in kernel.params:
        is_size = parameter.name in ("length", "batch_size")
        if parameter.is_constexpr or (is_size and sizes == "constants"):
            signature[parameter.name], given[parameter.name] = "constexpr", constants.get(parameter.name, 512)
        else:
            signature[parameter.name] = "i32" if is_size else f"*{POINTERS.get(parameter.name, 'bf16')}"
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert "wgmma" in code.asm["ptx"]
    assert code.metadata.shared <= 99 * 1024


def attend(q: Tensor, k: Tensor, v: Tensor, articles: Tensor) -> tuple[Tensor]:
    return (kernels.article_attention(q, k, v, articles, 0.125).sin(),)


@needs_triton
def test_a_captured_graph_holds_two_operators_and_nothing_of_the_scores_size() -> None:
    with lowering.fake_mode():
        q = torch.empty(2, 8, 640, 64, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(2, 2, 640, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        articles = torch.empty(2, 2, 640, dtype=torch.int32)
    with lowering.quiet_torch():
        graph = lowering.trace_joint(attend, [q, k, v, articles])
    operators = [node for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "substrate"]
    assert [node.target._schema.name for node in operators] == [
        "substrate::article_attention_forward",
        "substrate::article_attention_backward",
    ]
    values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert max(value.numel() for value in values) == q.numel()
    with lowering.quiet_torch():
        forward, backward = lowering.split_joint(graph, 1)
    assert count_flops(forward) == 2 * q.numel() * 640
    assert count_flops(backward) == 5 * q.numel() * 640


def test_what_the_kernels_take() -> None:
    def takes(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, keys: int = 4, scale: float = 0.1) -> bool:
        with lowering.fake_mode():
            q, k = (torch.empty(1, 2, length, head_dim, device="cuda", dtype=dtype) for length in (4, keys))
        return kernels.has_article_kernels(q, k, k, scale)

    assert not takes()  # eager code stays op for op what it is compared with
    with in_capture.kernels_in_capture():
        assert takes()
        assert takes(torch.float16, 128)
        assert not takes(torch.float32)
        assert not takes(head_dim=96)
        assert not takes(keys=5)
        assert not takes(scale=-0.1)


@pytest.mark.parametrize(("heads", "groups", "packed"), [(32, 4, 8), (32, 32, 1), (28, 4, 1), (6, 1, 2), (32, 1, 8)])
def test_heads_of_a_tile(heads: int, groups: int, packed: int) -> None:
    assert kernels.packed_heads(heads, groups) == packed
