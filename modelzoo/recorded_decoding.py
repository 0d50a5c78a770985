"""One token's forward as a CUDA graph: recorded once in a `generate()`, then replayed for every further token.

A token of a small batch has little to compute and hundreds of kernels, each of which takes longer to launch than to
run. With a cache of fixed size (`cache_implementation="static"`) a token differs from the next in the values of few
tensors only, so all launches can be one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

logger = logging.get_logger(__name__)


class RecordedDecoding:
    """A causal LM's forward on a GPU. Calls that a recording cannot stand for are computed as they come.

    The first call of a form is computed, which sets up what a recording must not (workspaces, checks of state); the
    second is recorded. A call has another form when a tensor of it has another shape, when anything else that it is
    given differs, or when its cache lies elsewhere in memory, as after a beam search has sorted it. The logits are the
    caller's; a form whose result holds more than logits and cache is not recorded.
    """

    def __init__(self, forward: Callable[..., CausalLMOutputWithPast]) -> None:
        self.forward = forward
        self.form: object = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: dict[str, Tensor] = {}
        self.logits: Tensor | None = None
        self.is_possible = True

    def __call__(self, **given: Any) -> CausalLMOutputWithPast:
        """As the model's own forward, with keywords."""
        if not self.is_possible:
            return self.forward(**given)
        form = _form(given)
        if form != self.form:
            self.graph = None
            outputs = self.forward(**given)
            self.form = form if outputs.keys() <= {"logits", "past_key_values"} else None
            return outputs
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        # Kernels go to the device of their tensors, recording and replaying to the current one.
        with torch.cuda.device(_device_of(tensors)):
            if self.graph is None and not self._record(given, tensors):
                return self.forward(**given)
            assert self.graph is not None
            assert self.logits is not None
            for name, value in tensors.items():
                self.inputs[name].copy_(value)
            self.graph.replay()
            return CausalLMOutputWithPast(logits=self.logits.clone(), past_key_values=given.get("past_key_values"))

    def _record(self, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bool:
        """Record a forward without computing it; False, and one warning, where the model does what cannot be."""
        self.inputs = {name: value.clone() for name, value in tensors.items()}
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=_stream_on(_device_of(tensors))):
                self.logits = self.forward(**{**given, **self.inputs}).logits
        except RuntimeError as error:  # of the driver, where something waits for the device or comes from the host
            reason = str(error).strip().splitlines()[0]
            logger.warning(f"A token's forward cannot be recorded, so that kernels are launched one by one: {reason}")
            self.is_possible = False
            return False
        self.graph = graph
        return True


@cache
def _stream_on(device: torch.device) -> torch.cuda.Stream:
    """The stream to record on: torch's own belongs to the device that anything was first recorded on."""
    return torch.cuda.Stream(device)


def _device_of(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device


def _form(given: Mapping[str, Any]) -> object:
    """What two calls must have in common to be one recording."""
    return {name: _form_of(value) for name, value in given.items()}


def _form_of(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, Cache):
        return [
            tensor.data_ptr() for layer in value.layers for tensor in vars(layer).values() if isinstance(tensor, Tensor)
        ]
    return value
