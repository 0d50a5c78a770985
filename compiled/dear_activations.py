"""What a block does not keep of its activations, because its backward makes it again for little."""

import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def compute_cheap_ones_again(joint: GraphModule) -> None:
    """Mark what elementwise operators make for the forward's products as made again by the backward.

    A product's weight gradient needs its input: of a Llama's block both norms' results and the MLP's gated product,
    which are a pass over memory each, and a third of what a block would keep. The rotated queries and keys go into
    attention, not into a product, and stay.
    """
    behind_gradients: set[Node] = set()
    for node in joint.graph.nodes:
        is_gradient = node.op == "placeholder" and node.name.startswith("tangents")
        if is_gradient or not behind_gradients.isdisjoint(node.all_input_nodes):
            behind_gradients.add(node)
    products = [node for node in joint.graph.nodes if node.target in PRODUCTS and node not in behind_gradients]
    found = [source for product in products for source in product.all_input_nodes]
    while found:
        node = found.pop()
        if "recompute" not in node.meta and _is_cheap(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            found += node.all_input_nodes


def compute_masks_again(joint: GraphModule, number: int) -> None:
    """Mark what elementwise operators make of input `number` and constants as made again by the backward.

    A mask made of the spans of articles is [B, S, S] and would be kept by every block; the spans lie there anyway.
    """
    made, constants = {joint.graph.find_nodes(op="placeholder")[number]}, set[Node]()
    for node in joint.graph.nodes:
        sources = node.all_input_nodes
        if node.op in ("placeholder", "output") or (sources and not _is_cheap(node)):
            continue
        if constants.issuperset(sources):
            constants.add(node)
        elif made.issuperset(set(sources) - constants):
            made.add(node)
    found = list(made)
    while found:
        node = found.pop()
        if node.all_input_nodes:
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        found += constants.intersection(node.all_input_nodes)


def _is_cheap(node: Node) -> bool:
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    return operator.is_view or torch.Tag.pointwise in operator.tags
