"""Gradients put side by side for a joint product: each kernel writes its piece where it belongs.

Inductor's own lowering of such a `cat` on a GPU is one kernel over the whole result that looks which piece an element
belongs to; pieces that read the same tensors (a gated MLP's two gradients) then read them once each. Made apart they
are two kernels that Inductor fuses into one, which reads everything once. Touches torch's private compiler interfaces,
like `lowering`.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

_CAT = torch.ops.aten.cat.default
_VIEWS = {
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.t.default,
}
_PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}


def is_for_products(node: Node) -> bool:
    """Whether nothing but matrix products reads a value, which therefore lies in memory as a whole."""
    return bool(node.users) and all(
        user.target in _PRODUCTS or (user.target in _VIEWS and is_for_products(user)) for user in node.users
    )


@contextlib.contextmanager
def pieces_in_place() -> Iterator[None]:
    """Lower a `cat` that matrix products read piece by piece; all others as before."""
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    before = lowerings[_CAT]

    def cat(inputs: Any, dim: int = 0) -> Any:
        node: Any = V.current_node
        if node.target is not _CAT or not is_for_products(node):  # a lowering may call another one
            return before(inputs, dim)
        return ir.TensorBox(ir.ConcatKernel.create(inputs, dim % len(inputs[0].get_size())))

    lowerings[_CAT] = cat
    try:
        yield
    finally:
        lowerings[_CAT] = before
