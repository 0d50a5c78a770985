"""Pieces of a product's operand are written to their places, all other pieces are put side by side as before."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from compiled import lowering
from compiled.lowering_pieces import is_for_products, pieces_in_place


def gradients(grad: Tensor, gate: Tensor, up: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients of a gated MLP's two layers in one, its products, and a cat that is read element by element."""
    both = torch.cat([grad * up, grad * gate.sigmoid()], -1)
    return both.t() @ x, both @ torch.cat([x, x], 0)[: both.shape[1]], torch.cat([grad, up], 1) * 2


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(24, columns, generator=generator) for columns in (8, 8, 8, 12)]


def test_only_what_products_alone_read_is_for_products() -> None:
    graph = make_fx(gradients)(*inputs())
    cats = [node for node in graph.graph.nodes if node.target is torch.ops.aten.cat.default]
    assert [is_for_products(node) for node in cats] == [True, False, False]  # the second is sliced


def test_each_piece_of_a_products_operand_goes_to_its_place() -> None:
    with lowering.quiet_torch():
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.scheduler import NopKernelSchedulerNode

    def look(nodes: list[Any]) -> None:
        made = [list(node.node.get_size()) for node in nodes if isinstance(node, NopKernelSchedulerNode)]
        raise RuntimeError(f"made in places: {made}")  # before any code is generated

    given = inputs()
    # what Inductor does on a GPU by itself
    options = {"force_pointwise_cat": True, "_pre_fusion_custom_pass": look}
    with lowering.quiet_torch(), config.patch(options):
        graph = make_fx(gradients)(*given)
        with pytest.raises(Exception, match=r"made in places: \[\]"):
            compile_fx(graph, given)(*given)
        with pieces_in_place(), pytest.raises(Exception, match=r"made in places: \[\[24, 16\]\]"):
            compile_fx(graph, given)(*given)
