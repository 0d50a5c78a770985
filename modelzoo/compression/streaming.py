"""Calibration data through a model one block at a time: only one block's inputs and moments are ever held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy

import torch
from torch import Tensor, nn

from backends.errors import UserError
from modelzoo.compression.block_calls import Batch, BlockCall, Reached, block_calls, require_no_cache, without_cache
from modelzoo.compression.moments import Moments


class BlockInputs:
    """The hidden states of all calibration batches in front of one block, and what else each block is called with."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], batches: Iterable[Batch]) -> None:
        """One forward of the dense model through its blocks for each batch."""
        self.hidden_states: list[Tensor] = []
        self._calls: dict[str, list[BlockCall]] = {path: [] for path in blocks}
        number = 0
        with without_cache(model):
            for batch in batches:
                number += 1
                require_no_cache(batch)
                found = block_calls(model, blocks, batch)
                if found is not None:
                    self.hidden_states.append(found[0])
                    for path, call in found[1].items():
                        self._calls[path].append(call)
        if not number:
            raise UserError("There is no calibration data: expected at least one batch.")
        if not self.hidden_states:
            row = next(iter(blocks)).rpartition(".")[0]
            raise UserError(
                f"The row of blocks '{row}' was given nothing by the calibration data. Give batches that reach it, or "
                "name layers of another row with match."
            )

    def copy(self) -> BlockInputs:
        """The same hidden states, to be advanced through other blocks."""
        other = copy(self)
        other.hidden_states = list(self.hidden_states)
        return other

    def until(
        self, path: str, block: nn.Module, layer: nn.Module, tap: nn.Module | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What `layer` and, computed before it, `tap` are given by each batch in turn; nothing behind it is computed.

        Both are parts of `block`, which stands at `path`; `tap` None: the block itself.
        """
        for hidden, call in self._each(path):
            seen = {"tap": hidden}

            def reach(part: nn.Module, inputs: tuple[Tensor, ...], seen: dict[str, Tensor] = seen) -> None:
                seen["layer"] = inputs[0].detach()
                raise Reached

            def pass_by(part: nn.Module, inputs: tuple[Tensor, ...], seen: dict[str, Tensor] = seen) -> None:
                seen["tap"] = inputs[0].detach()

            handles = [] if tap is None else [tap.register_forward_pre_hook(pass_by)]
            handles.append(layer.register_forward_pre_hook(reach))
            try:
                with suppress(Reached):
                    call.output(block, hidden)
            finally:
                for handle in handles:
                    handle.remove()
            yield seen["layer"], seen["tap"]

    def outputs(self, path: str, block: nn.Module) -> Iterator[Tensor]:
        """What `block`, called as the one at `path`, gives for each batch in turn."""
        for hidden, call in self._each(path):
            yield call.output(block, hidden)

    def advance(self, path: str, block: nn.Module) -> None:
        """Put the outputs of `block`, which stands at `path`, in the place of its inputs."""
        for index, output in enumerate(self.outputs(path, block)):
            self.hidden_states[index] = output

    def _each(self, path: str) -> Iterator[tuple[Tensor, BlockCall]]:
        return zip(self.hidden_states, self._calls[path], strict=True)


@contextmanager
def moments_of(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, Moments]]:
    """Moments of what the layers are given while this is open; layers with one input share one object.

    UserError naming the layer whose inputs are not finite.
    """
    found: dict[str, Moments] = {}
    leaders: dict[str, str] = {}
    seen: list[tuple[Tensor, int, str]] = []  # held, so that no other input of this batch can lie at the same place

    def hook(name: str, layer: nn.Linear, x: Tensor) -> None:
        if name not in leaders:
            alike = next((other for tensor, version, other in seen if tensor is x and version == version_of(x)), name)
            leaders[name] = alike
            seen.append((x, version_of(x), name))
            found[name] = found[alike] if alike != name else Moments.empty(layer.in_features, x.device)
        else:
            seen.clear()
        if leaders[name] == name:
            found[name].add(x)

    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: hook(name, layer, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if name not in found:
            raise UserError(f"Layer '{name}' was given nothing by the calibration data. Leave it out.")
        if not bool(torch.isfinite(found[name].second).all()):
            raise UserError(
                f"The inputs of layer '{name}' are not finite on the calibration data. Compress a model that computes "
                "them, perhaps in float32."
            )


def version_of(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not say."""
    return 0 if tensor.is_inference() else tensor._version


def linears_of(block: nn.Module, path: str, chosen: Sequence[str]) -> dict[str, nn.Linear]:
    """The block's linear layers among `chosen`, by full name."""
    named = {f"{path}.{name}": part for name, part in block.named_modules()}
    return {name: part for name, part in named.items() if name in chosen and isinstance(part, nn.Linear)}
