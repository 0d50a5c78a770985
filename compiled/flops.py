"""FLOPs of a traced graph: its matrix products and attention, a multiplication and an addition counting two.

An operator of our own, or of a backend outside the house, counts what its author registered for it with
`torch.utils.flop_counter.register_flop_formula`; without a formula it counts nothing.

Causal attention counts half of its square (the half that has to be computed), with a mask the whole, its backward 2.5
times its forward: five products of which one repeats the forward's. Kernels for articles count as causal. Elementwise
work is not counted, as is the custom for MFU.
"""

from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry


def count_flops(graph: GraphModule) -> int:
    """FLOPs of one run of `graph`, read off the shapes its nodes were traced with."""
    return sum(_node_flops(node) for node in graph.graph.nodes if node.op == "call_function")


def _values(arguments: Any) -> Any:
    """The (fake) tensors that the nodes among an operator's arguments stand for, in their places."""
    return map_arg(arguments, lambda node: node.meta["val"])


def _node_flops(node: Node) -> int:
    operator: Any = node.target
    schema: Any = getattr(operator, "_schema", None)
    if schema is None:
        return 0
    if operator.namespace not in ("aten", "prims"):
        formula = flop_registry.get(operator.overloadpacket)
        return 0 if formula is None else int(formula(*_values(node.args), **_values(node.kwargs)))
    arguments = {
        argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)
    } | node.kwargs
    name = schema.name.removeprefix("aten::")
    if name in ("mm", "bmm", "addmm", "baddbmm", "_scaled_mm"):
        left, right = (
            ("mat1", "mat2") if name == "addmm" else ("batch1", "batch2") if name == "baddbmm" else ("self", "mat2")
        )
        a, b = _shape(arguments[left]), _shape(arguments[right])
        return 2 * _product(a) * b[-1]
    if name.startswith("_scaled_dot_product"):
        return _attention_flops(arguments, backward=name.endswith("_backward"))
    return 0


def _attention_flops(arguments: dict[str, Any], backward: bool) -> int:
    query, key, value = (_shape(arguments[name]) for name in ("query", "key", "value"))
    pairs = _product(query[:-1]) * key[-2]
    forward = 2 * pairs * (query[-1] + value[-1])
    if arguments.get("is_causal"):
        forward //= 2
    return forward * 5 // 2 if backward else forward


def _shape(node: Any) -> tuple[int, ...]:
    value: Tensor = node.meta["val"]
    return tuple(int(extent) for extent in value.shape)


def _product(extents: tuple[int, ...]) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result
