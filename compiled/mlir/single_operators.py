"""A graph taken apart: each distinct operator as a graph of its own, to find those that a lowering refuses."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg


@dataclass(frozen=True)
class Single:
    """A graph of one operator (`aten.mm.default`); `key` tells apart those of other shapes, dtypes or numbers."""

    key: str
    operator: str
    graph: GraphModule

    @property
    def inputs(self) -> list[Tensor]:
        return [node.meta["val"] for node in self.graph.graph.nodes if node.op == "placeholder"]


def single_operators(graph: GraphModule) -> Iterator[Single]:
    """Every distinct operator of `graph`, in its order."""
    seen = set()
    for node in graph.graph.nodes:
        if node.op != "call_function" or not all(isinstance(each.meta["val"], Tensor) for each in node.all_input_nodes):
            continue  # one result of several: the operator before it is tried
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            continue  # a write in place becomes a result
        key = f"{node.target}{_described(node.args)}{_described(node.kwargs)}"
        if key not in seen:
            seen.add(key)
            yield Single(key, str(node.target), _alone(node, graph))


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
