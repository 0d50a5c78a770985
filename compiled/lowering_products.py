"""Matrix products of a CPU region given to oneDNN.

PyTorch gives float32 products to MKL, which on processors other than Intel's runs its AVX2 kernels. oneDNN, which
PyTorch carries as well, makes AVX-512 ones for any maker's processor: on an AMD EPYC (Zen 5, two cores) 260 to 430
GFLOP/s where MKL gives 130 to 190. `spec.float32_library` says where this is done. Touches torch's private compiler
interfaces, like `lowering`.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

_LINEAR = torch.ops.mkldnn._linear_pointwise.default


def give_to_onednn(graph: GraphModule) -> GraphModule:
    """`graph` with its float32 `mm` and `addmm` computed by oneDNN; shapes and strides of all results stay."""
    graph = copy.deepcopy(graph)
    for target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
        for node in graph.graph.find_nodes(op="call_function", target=target):
            if _fits(node):
                with graph.graph.inserting_before(node):
                    _replace(graph, node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _fits(node: Node) -> bool:
    """Whether a product is of float32 matrices that lie row by row or column by column, and of nothing else."""
    factors = [argument.meta["val"] for argument in node.args[-2:] if isinstance(argument, Node)]
    dense = all(1 in factor.stride() and min(factor.shape) <= max(factor.stride()) for factor in factors)
    return not node.kwargs and dense and node.meta["val"].dtype == torch.float32 and node.meta["val"].numel() > 0


def _replace(graph: GraphModule, node: Node) -> None:
    *bias, left, right = node.args
    product = _product(graph, left, right)
    if bias:
        product = _call(graph, torch.ops.aten.add.Tensor, product, bias[0])
    product.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(product)
    graph.graph.erase_node(node)


def _product(graph: GraphModule, left: Any, right: Any) -> Node:
    """left · right by oneDNN's linear(x, w) = x · wᵀ, which copies an x that does not lie row by row, never a w.

    Where left lies column by column (the gradient of a weight), the transposed product may copy less.
    """
    (m, k), (_, n) = left.meta["val"].shape, right.meta["val"].shape
    straight = 0 if left.meta["val"].is_contiguous() else m * k
    turned = m * n + (0 if right.meta["val"].t().is_contiguous() else k * n)
    if straight <= turned:
        return _call(graph, _LINEAR, left, _transposed(graph, right), None, "none", [], "")
    product = _call(graph, _LINEAR, _transposed(graph, right), left, None, "none", [], "")
    return _call(
        graph, torch.ops.aten.clone.default, _transposed(graph, product), memory_format=torch.contiguous_format
    )


def _transposed(graph: GraphModule, node: Node) -> Node:
    return _call(graph, torch.ops.aten.permute.default, node, [1, 0])


def _call(graph: GraphModule, target: Any, *arguments: Any, **options: Any) -> Node:
    node = graph.graph.call_function(target, arguments, options)
    values = [argument.meta["val"] if isinstance(argument, Node) else argument for argument in arguments]
    node.meta["val"] = target(*values, **options)
    return node


@contextlib.contextmanager
def any_weight() -> Iterator[None]:
    """Let oneDNN linears take a weight that is computed and lies in any order; Inductor's own takes constants only.

    Inductor may have made one call of a product and an activation or a sum behind it, as of a head's chunks.
    """
    from torch._inductor.lowering import lowerings
    from torch._inductor.mkldnn_ir import LinearBinary, LinearUnary

    def linear(x: Any, weight: Any, bias: None, activation: str, numbers: Any, algorithm: str) -> Any:
        assert bias is None, "give_to_onednn adds a bias behind the product"
        return _external(LinearUnary, [x], weight, [None, activation, numbers or [-1], algorithm])

    def linear_and_sum(x: Any, other: Any, weight: Any, bias: None, operation: str) -> Any:
        assert bias is None, "give_to_onednn adds a bias behind the product"
        return _external(LinearBinary, [x, other], weight, [None, operation])

    own: dict[Any, Any] = {_LINEAR: linear, torch.ops.mkldnn._linear_pointwise.binary: linear_and_sum}
    before: dict[Any, Any] = {operator: lowerings[operator] for operator in own}
    lowerings.update(own)
    try:
        yield
    finally:
        lowerings.update(before)


def _external(kind: Any, dense: list[Any], weight: Any, options: list[Any]) -> Any:
    """A call of oneDNN on tensors of which all but the weight are made to lie row by row."""
    from torch._inductor import ir

    dense = [kind.require_contiguous(kind.realize_input(tensor)) for tensor in dense]
    weight = kind.realize_input(weight)
    layout = ir.FixedLayout(dense[0].get_device(), dense[0].get_dtype(), [dense[0].get_size()[0], weight.get_size()[0]])
    return ir.TensorBox.create(kind(layout, [*dense, weight], options))


def store_fp8_operands_once() -> None:
    """Let Inductor store an operand of several fp8 products once, as it does for products of other dtypes."""
    from torch._inductor.lowering import add_needs_realized_inputs

    add_needs_realized_inputs(torch.ops.aten._scaled_mm.default)
