"""What a block keeps of its activations, when it keeps only what is dear to compute."""

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


def _is_cheap(node: Node) -> bool:
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    return operator.is_view or torch.Tag.pointwise in operator.tags
