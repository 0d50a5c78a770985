"""Watching the layers that a backend computes while their model runs, and asking one of them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backends.layers import BackendAttention


@dataclass(frozen=True)
class Call:
    """What a layer was asked: the tensors that gradients flow to (x, or q, k and v), and everything else."""

    tensors: tuple[Tensor, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A layer's output, and the gradients of ⟨output, a given output gradient⟩; None where there is none."""

    output: Tensor
    inputs: tuple[Tensor, ...] | None
    weight: Tensor | None


Watcher = Callable[[str, nn.Module, Call, Tensor], None]


@contextmanager
def watched(model: nn.Module, layers: Iterable[str], watch: Watcher) -> Iterator[None]:
    """While entered, `watch(name, layer, call, output)` sees each call of these layers.

    Of attention that is `attend`, the part a backend computes; its projections are layers of their own.
    """
    undo: list[Callable[[], object]] = []
    try:
        for name in layers:
            layer = model.get_submodule(name)
            if isinstance(layer, BackendAttention):
                layer.attend = partial(_attend, layer, name, watch)  # type: ignore[method-assign]
                undo.append(partial(delattr, layer, "attend"))
            else:
                undo.append(layer.register_forward_hook(partial(_after_forward, name, watch)).remove)
        yield
    finally:
        for each in undo:
            each()


def answer(layer: nn.Module, call: Call, output_gradient: Tensor | None) -> Answer:
    """Ask `layer` alone, past anybody who watches it; with an output gradient, also for what flows back.

    The weight's gradient is that of a stored matrix that is trained; other parameters have no counterpart to compare.
    """
    if output_gradient is None:
        with torch.no_grad():
            return Answer(_compute(layer, call.tensors, call.options), None, None)
    with torch.enable_grad():
        tensors = tuple(tensor.detach().requires_grad_() for tensor in call.tensors)
        output = _compute(layer, tensors, call.options)
        if not output.requires_grad:  # a backend without gradient
            return Answer(output, None, None)
        weight = getattr(layer, "weight", None)
        weights = (weight,) if isinstance(weight, nn.Parameter) and weight.requires_grad else ()
        gradients = torch.autograd.grad(
            output, (*tensors, *weights), output_gradient.to(output.dtype), materialize_grads=True
        )
    return Answer(output.detach(), gradients[: len(tensors)], gradients[-1] if weights else None)


def _compute(layer: nn.Module, tensors: Sequence[Tensor], options: Mapping[str, Any]) -> Tensor:
    if isinstance(layer, BackendAttention):
        return type(layer).attend(layer, *tensors, **options)
    output: Tensor = layer.forward(*tensors)
    return output


def _after_forward(name: str, watch: Watcher, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    watch(name, layer, Call(inputs), output)


def _attend(
    layer: BackendAttention, name: str, watch: Watcher, q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> Tensor:
    output = type(layer).attend(layer, q, k, v, **options)
    watch(name, layer, Call((q, k, v), options), output)
    return output
