"""Results that keep their strides when the compiler pads products.

Where a product's sizes suit a GPU badly, the compiler multiplies padded matrices and hands on a slice of the result,
with the padded one's strides. Inside a region that is faster; but what leaves it goes to one that was traced without.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def keeping_output_strides(graph: GraphModule, change: Callable[[GraphModule], object]) -> None:
    """Apply `change` to a traced graph, then copy those of its outputs that have other strides than before."""
    before = [_strides(output) for output in _outputs(graph)]
    change(graph)
    outputs, end = _outputs(graph), graph.graph.output_node()
    with graph.graph.inserting_before(end):
        pairs = zip(outputs, before, strict=True)
        results: list[Any] = [each if _strides(each) == strides else _copied(graph, each) for each, strides in pairs]
    end.args = (tuple(results),)
    graph.recompile()


def has_strides_of(graph: GraphModule, results: object) -> bool:
    """Whether tensors that a compiled graph returned lie in memory as the traced one says."""
    assert isinstance(results, list | tuple)
    expected = map(_strides, _outputs(graph))
    return all(
        strides is None or strides == _without_ones(result.shape, result.stride())
        for strides, result in zip(expected, results, strict=True)
    )


def _outputs(graph: GraphModule) -> list[object]:
    (outputs,) = graph.graph.output_node().args
    assert isinstance(outputs, list | tuple)
    return list(outputs)


def _strides(output: object) -> tuple[int, ...] | None:
    value = output.meta.get("val") if isinstance(output, Node) else None
    if not isinstance(value, Tensor) or 0 in value.stride():  # an expanded one is written out
        return None
    return _without_ones(value.shape, value.stride())


def _without_ones(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of the dims of more than one element: those of others say nothing."""
    return tuple(step for extent, step in zip(shape, stride, strict=True) if extent != 1)


def _copied(graph: GraphModule, output: object) -> Node:
    assert isinstance(output, Node)
    copy = graph.graph.call_function(torch.ops.aten.clone.default, (output,))
    copy.meta["val"] = torch.ops.aten.clone.default(output.meta["val"])
    return copy
