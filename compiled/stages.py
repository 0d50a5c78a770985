"""What the compile room asks of a model, and how it sees one: an embedding, a row of blocks, a head.

The room knows no model family. A model says which submodules play which part (`stages()`); everything else,
parameters, state buffers, which blocks are alike, is read off the modules.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backends.state import Stateful, collect_state


class StageNames(Protocol):
    """Submodule paths of the parts of a model."""

    @property
    def embed(self) -> str: ...
    @property
    def blocks(self) -> list[str]: ...
    @property
    def norm(self) -> str: ...
    @property
    def head(self) -> str: ...


class StagedModel(Protocol):
    """A causal language model that can be cut into embed → blocks → norm → head.

    embed(input_ids) → hidden_states; block(hidden_states, cos, sin, articles) → hidden_states; norm and head → logits.
    Each is a pure function of its parameters, its state buffers and these tensors.
    """

    def stages(self) -> StageNames: ...
    def rotary_tables(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]: ...
    def get_submodule(self, target: str) -> nn.Module: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


@dataclass(frozen=True)
class Slot:
    """A parameter or state buffer of a stage: its name inside the stage and the model's name for it."""

    local: str
    full: str


@dataclass
class Stage:
    """One part of the model with its parameters and state buffers in a fixed order.

    `reduce`: how the new values of a state buffer become one over microbatches and workers; buffers without one are
    constants. `given`: buffers that the program fills in before each microbatch, all with its `first_row`. `joint`: the
    tensors that stand for several parameters, one's rows below the other's, and which (see `compiled.joining`).
    """

    path: str
    module: nn.Module
    parameters: list[Slot]
    state: list[Slot]
    reduce: dict[str, str]
    given: list[str]
    joint: dict[str, list[str]] = field(default_factory=dict)

    def tensors(self) -> dict[str, list[str]]:
        """What a region takes in place of the parameters, in their order, each with the parameters in it."""
        first = {members[0]: joint for joint, members in self.joint.items()}
        rest = {local for members in self.joint.values() for local in members[1:]}
        taken = [slot.local for slot in self.parameters if slot.local not in rest]
        return {first.get(local, local): self.joint.get(first.get(local, ""), [local]) for local in taken}

    def trained_parameters(self) -> dict[Slot, nn.Parameter]:
        """The parameters that need a gradient, in the stage's order."""
        parameters = dict(self.module.named_parameters())
        return {slot: parameters[slot.local] for slot in self.parameters if parameters[slot.local].requires_grad}

    def call(
        self, tensors: dict[str, Tensor], *inputs: Any, first_row: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The stage as a pure function: parameters (or joint ones) and state by local name in, output and new state
        out."""
        given = {local: first_row for local in self.given if first_row is not None}
        with collect_state() as collected:
            output = torch.func.functional_call(self.module, tensors | given, inputs)
        return output, collected.named(self.module)


def canonical_names(model: StagedModel) -> dict[int, str]:
    """Name of each parameter by identity; a tied parameter has the first of its names."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def make_stage(model: StagedModel, path: str) -> Stage:
    """The stage at submodule `path`, with the model's names of its parameters (tied ones: the first name)."""
    return stage_of(path, model.get_submodule(path), canonical_names(model), {"": path})


def stage_of(path: str, module: nn.Module, names: Mapping[int, str], prefixes: Mapping[str, str]) -> Stage:
    """A stage of `module`. `names`: of parameters by identity; `prefixes`: the model's path of each of its parts."""
    parameters = [Slot(local, names[id(parameter)]) for local, parameter in module.named_parameters()]
    specs = {
        f"{part}.{name}" if part else name: spec
        for part, layer in module.named_modules()
        if isinstance(layer, Stateful)
        for name, spec in layer.state_specs.items()
    }
    state, reduce, given = [], dict[str, str](), list[str]()
    for local, _ in module.named_buffers():
        spec = specs.get(local)
        if spec is not None and spec.given == "first_row":
            given.append(local)
            continue
        part = next(part for part in prefixes if not part or local.startswith(f"{part}."))
        rest = local.removeprefix(part).removeprefix(".")
        state.append(Slot(local, f"{prefixes[part]}.{rest}"))
        if spec is not None and spec.given is None:
            reduce[local] = spec.reduce
    return Stage(path, module, parameters, state, reduce, given)


def slots(stage: Stage) -> dict[str, Any]:
    """The stage's tensors as a schedule entry stores them: local name → the model's name."""
    return {
        "parameters": {slot.local: slot.full for slot in stage.parameters},
        "trained": [slot.local for slot in stage.trained_parameters()],
        "state": {slot.local: slot.full for slot in stage.state},
        "reduce": stage.reduce,
        "given": stage.given,
        "joint": stage.joint,
    }


# What a module has besides its settings; two layers that differ only in it trace to the same graph.
_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_layer_number", "_was_calibrated"}


def structure(module: nn.Module) -> str:
    """Fingerprint of what makes two blocks trace to the same graph: classes, plain settings, backends, tensor shapes.

    Tracing a block takes about a second; comparing structures takes a millisecond, so compile time stays flat in depth.
    """

    def describe(value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float | str | torch.dtype):
            return repr(value)
        if isinstance(value, tuple | list):
            return [describe(item) for item in value]
        if isinstance(value, Mapping):
            return [[str(key), describe(item)] for key, item in value.items()]
        if hasattr(value, "fingerprint"):
            return value.fingerprint()
        if is_dataclass(value):
            return repr(value)
        # anything else must be one object that the blocks share, as they share the model's config
        return f"{type(value).__qualname__}@{id(value)}"

    parts = []
    for name, part in module.named_modules():
        settings = {key: describe(value) for key, value in vars(part).items() if key not in _MODULE_INTERNALS}
        parts.append(
            [name, f"{type(part).__module__}.{type(part).__qualname__}", part.training, sorted(settings.items())]
        )
    tensors = [[name, list(p.shape), str(p.dtype), p.requires_grad] for name, p in module.named_parameters()]
    tensors += [[name, list(b.shape), str(b.dtype)] for name, b in module.named_buffers()]
    return hashlib.sha256(json.dumps([parts, tensors]).encode()).hexdigest()
