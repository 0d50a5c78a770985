"""Where the error of a backend arises, and what becomes of it on its way through the model.

Local: each layer is fed with what the *reference's* layer got, input and output gradient, so that it answers for its
own error alone. Accumulated: the whole routed model runs by itself, and each layer's output has the errors of all
layers before it too.

No more is held than a training step of the reference holds: a layer is compared while the reference's backward passes
it, when its input and its output gradient are both at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apps.parity.forward import logits_of, loss_of
from apps.parity.observing import Answer, Call, answer, watched
from apps.parity.powers import Error, ErrorSum, LocalErrors

Batches = Sequence[Mapping[str, Tensor]]


def local_errors(
    reference: nn.Module, other: nn.Module, layers: Sequence[str], batches: Batches, on_batch: Callable[[], object]
) -> dict[str, LocalErrors]:
    """Layer → errors over all `batches`; a layer that no gradient reaches is left out. Both models evaluate."""
    sums = {name: _Sums() for name in layers}

    def watch(name: str, layer: nn.Module, call: Call, output: Tensor) -> None:
        twin = other.get_submodule(name)

        def compare(gradient: Tensor | None) -> None:
            sums[name].add(answer(layer, call, gradient), answer(twin, call, gradient))

        if output.requires_grad:
            output.register_hook(compare)
        else:  # a backend without gradient still has an output
            compare(None)

    for batch in batches:
        with watched(reference, layers, watch), _gradients_from_embedding(reference) as embedded:
            loss = loss_of(logits_of(reference, batch), batch)
            torch.autograd.grad(loss, embedded)
        on_batch()
    return {name: errors for name, each in sums.items() if (errors := each.errors()) is not None}


def accumulated_errors(
    reference: nn.Module, other: nn.Module, layers: Sequence[str], batches: Batches, on_batch: Callable[[], object]
) -> dict[str, Error]:
    """Layer → error of its output when each model runs on its own. Both models evaluate."""
    sums = {name: ErrorSum() for name in layers}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, call: Call, output: Tensor) -> None:
        outputs[name] = output

    def compare(name: str, layer: nn.Module, call: Call, output: Tensor) -> None:
        sums[name].add([outputs.pop(name)], [output])

    for batch in batches:
        with torch.no_grad():
            with watched(reference, layers, keep):
                logits_of(reference, batch)
            with watched(other, layers, compare):
                logits_of(other, batch)
        on_batch()
    return {name: error for name, each in sums.items() if (error := each.error()) is not None}


class _Sums:
    """The three errors of one layer, as they add up."""

    def __init__(self) -> None:
        self.output, self.inputs, self.weight = ErrorSum(), ErrorSum(), ErrorSum()

    def add(self, reference: Answer, other: Answer) -> None:
        self.output.add([reference.output], [other.output])
        if reference.inputs is not None and other.inputs is not None:
            self.inputs.add(reference.inputs, other.inputs)
        if reference.weight is not None and other.weight is not None:
            self.weight.add([reference.weight], [other.weight])

    def errors(self) -> LocalErrors | None:
        output = self.output.error()
        return None if output is None else LocalErrors(output, self.inputs.error(), self.weight.error())


@contextmanager
def _gradients_from_embedding(model: Any) -> Iterator[list[Tensor]]:
    """Let the backward end at the embedding's output, which the list holds after a forward: no weight's gradient of
    the whole model is made."""
    embedded: list[Tensor] = []

    def cut(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = model.get_input_embeddings().register_forward_hook(cut)
    try:
        yield embedded
    finally:
        handle.remove()
