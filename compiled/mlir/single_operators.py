"""A graph taken apart: each distinct operator as a graph of its own, to find those that a lowering refuses."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg


def operator_name(node: Node) -> str:
    """`aten.mm.default` of a node that calls it."""
    return str(node.target)


def single_operators(graph: GraphModule) -> Iterator[tuple[str, Node, GraphModule]]:
    """Key, node and a graph of that node alone, for each operator called with other shapes, dtypes or numbers."""
    seen = set()
    for node in graph.graph.nodes:
        if node.op != "call_function" or not all(isinstance(each.meta["val"], Tensor) for each in node.all_input_nodes):
            continue  # one result of several: the operator before it is tried
        key = f"{operator_name(node)}{_described(node.args)}{_described(node.kwargs)}"
        if key not in seen:
            seen.add(key)
            yield key, node, _alone(node, graph)


def _alone(node: Node, owner: GraphModule) -> GraphModule:
    graph = Graph()
    inputs: dict[Node, Node] = {}
    for source in node.all_input_nodes:
        inputs[source] = graph.placeholder(source.name)
        inputs[source].meta["val"] = source.meta["val"]
    copy = graph.node_copy(node, inputs.__getitem__)
    graph.output((copy,) if isinstance(node.meta["val"], Tensor) else copy)
    return GraphModule(owner, graph)


def _described(arguments: Any) -> str:
    def describe(node: Node) -> Any:
        value = node.meta.get("val")
        return f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else node.name

    return repr(map_arg(arguments, describe))
