"""Weights that a backend rounds to 8 bits, between forward and backward."""

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy


def round_weights_again(joint: GraphModule, num_parameters: int) -> None:
    """Mark weights in 8 bits, and what is made of them alone, as made again by the backward: they are smaller than the
    weights, so that the cut would keep a copy of each layer's from its forward to its backward."""
    of_parameters = set(joint.graph.find_nodes(op="placeholder")[:num_parameters])
    rounded: set[Node] = set()
    for node in joint.graph.nodes:
        inputs, value = node.all_input_nodes, node.meta.get("val")
        if node.op != "call_function" or not of_parameters.issuperset(inputs) or not isinstance(value, Tensor):
            continue
        of_parameters.add(node)
        if (value.is_floating_point() and value.itemsize == 1) or not rounded.isdisjoint(inputs):
            rounded.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
