"""What layers remember for their backends, threaded functionally.

Inside `collect_state()` a layer's new state goes to the collector and its buffers stay as they are: a second forward or
a recompute reads the same state, gives the same numbers, and the last result counts once. Outside, as in any PyTorch
training loop, a layer in training mode updates its buffers at the end of its forward.

State that has seen nothing yet (a range of infinities) is filled by training forwards; evaluation with it is refused.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from backends.base import State, StateSpec
from backends.errors import UserError


class CollectedState(dict[tuple["Stateful", str], Tensor]):
    """(layer, buffer name) → new value."""

    def named(self, root: nn.Module) -> dict[str, Tensor]:
        """The same under the buffers' full names in `root`, as in `root.named_buffers()`."""
        paths = {module: f"{path}." if path else "" for path, module in root.named_modules()}
        return {paths[layer] + name: value for (layer, name), value in self.items()}

    def commit(self) -> None:
        """Copy the new values into the layers' buffers; call it once a step."""
        with torch.no_grad():
            for (layer, name), value in self.items():
                layer.get_buffer(name).copy_(value)


# Not thread-local: on a GPU autograd recomputes activations in a thread of its own, which must see the collector too.
_collectors: list[CollectedState] = []
# The state a layer's last forward read, for the recompute of that forward by activation checkpointing.
_before_update: WeakKeyDictionary[nn.Module, State] = WeakKeyDictionary()


@contextmanager
def collect_state() -> Iterator[CollectedState]:
    """Collect the new state of every layer called inside; nothing is written to a buffer."""
    collected = CollectedState()
    _collectors.append(collected)
    try:
        yield collected
    finally:
        _collectors.pop()


class Stateful(nn.Module):
    """A layer with buffers for its backend: `.to(dtype)` keeps their dtype, leaving the meta device fills them."""

    state_specs: Mapping[str, StateSpec] = MappingProxyType({})
    _layer_number = 0  # see `set_layer_name`
    _was_calibrated = False  # an evaluation found so; what was seen stays seen

    def set_state(self, specs: Mapping[str, StateSpec], device: torch.device | None) -> None:
        """Replace the buffers by those of `specs`, at their initial values. They are not part of a saved checkpoint."""
        for name in self.state_specs:
            delattr(self, name)
        self.state_specs = specs
        self._was_calibrated = False
        for name, spec in specs.items():
            self.register_buffer(name, self._initial(spec, device), persistent=False)

    def set_layer_name(self, name: str) -> None:
        """Give the backend a number that tells this layer from the model's others: 31 bits of a hash of its name."""
        self._layer_number = zlib.crc32(name.encode()) & 0x7FFFFFFF
        for buffer, spec in self.state_specs.items():
            if spec.given == "layer":
                self.get_buffer(buffer).fill_(self._layer_number)

    def call_with_state(self, compute: Callable[[State], tuple[Tensor, State]]) -> Tensor:
        """Run `compute(state) -> (y, new state)` and keep the new state where it belongs now."""
        if not self.state_specs:
            return compute({})[0]
        state: State = {name: self.get_buffer(name) for name in self.state_specs}
        if _collectors:
            y, new_state = compute(state)
            if self.training:
                for name, value in self._returned(new_state).items():
                    # A region's output must not be one of its inputs, and buffers are written one after another: state
                    # handed on, under its own name or another one, is copied.
                    is_given = any(value is each for each in state.values())
                    _collectors[-1][self, name] = value.clone() if is_given else value.detach()
            return y
        if not self.training:
            self._require_calibrated()
            return compute(state)[0]
        if _in_backward():
            return compute(_before_update.get(self, state))[0]
        # Copies: the graph may have saved the old values, and they are overwritten below.
        before = {name: value.clone() for name, value in state.items()}
        y, new_state = compute(before)
        with torch.no_grad():
            for name, value in self._returned(new_state).items():
                state[name].copy_(value)
        if not torch.compiler.is_compiling():
            _before_update[self] = before
        return y

    def _returned(self, new_state: State) -> State:
        """What the backend has to return: all but the state that is given to it."""
        wanted = [name for name, spec in self.state_specs.items() if spec.given is None]
        missing = [name for name in wanted if name not in new_state]
        assert not missing, f"the backend did not return its new state {missing}"
        return {name: new_state[name] for name in wanted}

    def _require_calibrated(self) -> None:
        """Refuse to evaluate in a plain PyTorch loop before training has; asks the device once, and no tracer."""
        if self._was_calibrated or torch.compiler.is_compiling():
            return
        if all(has_data(self.get_buffer(name)) for name in self.state_specs):
            require_calibrated(self)
            self._was_calibrated = True

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        before = {name: self.get_buffer(name) for name in self.state_specs}
        super()._apply(fn, *args, **kwargs)
        for name, old in before.items():
            moved = self.get_buffer(name)
            if old.is_meta and not moved.is_meta:
                setattr(self, name, self._initial(self.state_specs[name], moved.device))
            elif moved.dtype != old.dtype:
                setattr(self, name, old.to(moved.device))
        return self

    def _initial(self, spec: StateSpec, device: torch.device | None) -> Tensor:
        fill = self._layer_number if spec.given == "layer" else spec.fill
        return torch.full(spec.shape, fill, dtype=getattr(torch, spec.dtype), device=device)


def require_calibrated(model: nn.Module) -> None:
    """UserError that names the first layer whose backend knows no range, having seen no data. Waits for the device."""
    for path, module in model.named_modules():
        unseen = [
            module.get_buffer(name).eq(spec.fill).any()
            for name, spec in (module.state_specs.items() if isinstance(module, Stateful) else ())
            if math.isinf(spec.fill)
        ]
        if unseen and bool(torch.stack(unseen).any()):
            assert isinstance(module, Stateful)
            names = ", ".join(name for name, spec in module.state_specs.items() if math.isinf(spec.fill))
            where = f"Layer '{path}'" if path else "This layer"
            raise UserError(
                f"{where} is not calibrated: {names} of backend {getattr(module, 'backend', '')} saw no data yet. "
                "Run the model on a few batches in training mode first."
            )


def set_first_row(model: nn.Module, first_row: int | Tensor) -> None:
    """Tell the layers' backends which row of the step their next input begins with."""
    for module in model.modules():
        if isinstance(module, Stateful):
            for name, spec in module.state_specs.items():
                if spec.given == "first_row":
                    module.get_buffer(name).copy_(torch.as_tensor(first_row))


def has_data(tensor: Tensor) -> bool:
    """Whether a value can be read from `tensor`: it is no tracer's and lies on a device."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def reset_state(model: nn.Module) -> None:
    """Set every layer's state to its initial values, on the device of its parameters.

    A model built on the meta device needs it when its parameters were put in place one by one.
    """
    of_model = device_of(model)
    for module in model.modules():
        if isinstance(module, Stateful) and module.state_specs:
            module.set_state(module.state_specs, device_of(module) or of_model)


def device_of(module: nn.Module) -> torch.device | None:
    """The device of the first parameter; None without parameters (then torch's default device applies)."""
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


def _in_backward() -> bool:
    # The only sign that a forward is a recompute; torch.utils.checkpoint itself relies on it.
    return torch._C._current_graph_task_id() != -1
