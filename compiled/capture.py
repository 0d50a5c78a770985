"""Trace the parts of a train step into regions: pure graphs with named inputs and outputs, on fake tensors, without
weights.

A stage (the embedding, a block) becomes a forward and a backward graph. What the backward needs is passed by name: a
forward input is taken from where it already lies, and only true activations leave the forward as `saved_i`.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from compiled import lowering
from compiled.dear_activations import compute_masks_again
from compiled.flops import count_flops
from compiled.regions import RegionSpec, TensorSpec
from compiled.stages import Stage


@dataclass
class Captured:
    """A traced region, not yet machine code: graph, fake inputs, spec."""

    graph: GraphModule
    inputs: list[Tensor]
    spec: RegionSpec

    @property
    def identity(self) -> str:
        """Equal for two regions that compute the same thing on the same inputs: the hash of graph and input specs."""
        specs = [f"{spec.name}:{spec}" for spec in (*self.spec.inputs, *self.spec.outputs)]
        code = [str(part.code) for part in self.graph.modules() if isinstance(part, GraphModule)]
        # a table a backend baked in is only named in the code; its values make another region
        constants = [f"{name}:{table.dtype}{table.tolist()}" for name, table in self.graph.named_buffers()]
        return hashlib.sha256("\n".join([*code, *specs, *constants]).encode()).hexdigest()


@dataclass
class Sources:
    """Makes the fake tensors a trace starts from, on one device."""

    mode: FakeTensorMode
    device: torch.device
    keeps_cheap: bool = True  # activations that a pass over memory would make again

    def empty(self, shape: Sequence[int], dtype: torch.dtype, requires_grad: bool = False) -> Tensor:
        with self.mode:
            return torch.empty(tuple(shape), dtype=dtype, device=self.device, requires_grad=requires_grad)

    def like(self, tensor: Tensor, requires_grad: bool = False) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype, requires_grad)

    def stage_tensors(self, stage: Stage, with_grad: bool = True) -> dict[str, Tensor]:
        """Parameters, alone or joint, and state of a stage by local name, in the stage's order."""
        parameters = dict(stage.module.named_parameters())
        buffers = dict(stage.module.named_buffers())
        tensors = {}
        for name, members in stage.tensors().items():
            first, rows = parameters[members[0]], sum(len(parameters[local]) for local in members)
            tensors[name] = self.empty((rows, *first.shape[1:]), first.dtype, with_grad and first.requires_grad)
        return tensors | {slot.local: self.like(buffers[slot.local]) for slot in stage.state}

    def first_row(self, stage: Stage) -> dict[str, Tensor]:
        """The input `first_row`, where the stage has a backend that counts from it."""
        return {"first_row": self.empty((), torch.int64)} if stage.given else {}


def capture_function(
    name: str,
    function: Callable[..., tuple[Tensor, ...]],
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    mutated: Sequence[str] = (),
) -> Captured:
    """Trace `function(*inputs)` as one region; it may call `autograd.grad` and write the inputs in `mutated`."""
    graph = lowering.trace(function, list(inputs.values()))
    results = [lowering.node_value(node) for node in _output_nodes(graph)]
    return _region(name, graph, inputs, dict(zip(outputs, results, strict=True)), mutated)


def capture_stage(
    name: str, stage: Stage, activations: dict[str, Tensor], sources: Sources
) -> tuple[Captured, Captured | None]:
    """Forward and backward region of a stage; no backward when nothing in it wants a gradient (a frozen embedding).

    `activations` are the tensors after parameters and state, the first being the one the gradient flows to (token ids
    get none). Forward: parameters, state, activations[, first_row] → `output`, `new_<state>`…, `saved_i`…. Backward:
    what it needs by name, `grad_output` → `grad_<parameter>`…, `grad_<activation>`.
    """
    tensors = sources.stage_tensors(stage)
    inputs = tensors | activations | sources.first_row(stage)
    state_names = list(stage.reduce)

    def forward(*flat: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, flat, strict=True))
        output, new_state = stage.call(
            {key: named[key] for key in tensors},
            *(named[key] for key in activations),
            first_row=named.get("first_row"),
        )
        # nothing is returned in evaluation, where state stays as it is
        return (output, *(new_state[key] if key in new_state else named[key].clone() for key in state_names))

    outputs = ["output", *(f"new_{key}" for key in state_names)]
    if not any(tensor.requires_grad for tensor in inputs.values()):
        return capture_function(f"{name}_forward", forward, inputs, outputs), None
    joint = lowering.trace_joint(forward, list(inputs.values()))
    if "articles" in inputs:
        compute_masks_again(joint, list(inputs).index("articles"))
    forward_graph, backward_graph = lowering.split_joint(
        joint, len(outputs), len(stage.tensors()), keeps_cheap=sources.keeps_cheap
    )
    return _name_crossing(name, forward_graph, backward_graph, inputs, outputs, set(stage.tensors()))


_VIEWS = {
    torch.ops.aten.permute.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.t.default,
    torch.ops.aten.view.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.expand.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
}


def _view_chain(node: Node) -> list[Node]:
    """The view operators from a forward input to `node`, first to last; empty when `node` is more than such a view."""
    chain = []
    while node.op == "call_function" and node.target in _VIEWS:
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return chain[::-1] if node.op == "placeholder" else []


def _made_of_parameters(forward: GraphModule, parameters: set[str]) -> set[Node]:
    """Nodes that products and sums of parameters alone give: a weight with its low-rank update, W + B A."""
    alone: set[Node] = set()
    products: set[Node] = set()
    for node in forward.graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "placeholder" and node.name in parameters:
            alone.add(node)
        elif node.op == "call_function" and inputs and alone.issuperset(inputs):
            alone.add(node)
            if node.target is torch.ops.aten.mm.default or not products.isdisjoint(inputs):
                products.add(node)
    return products


def _redone(node: Node, made_of_parameters: set[Node]) -> list[Node]:
    """What the backward does again rather than be given `node`, in order; empty for an activation."""
    if node not in made_of_parameters:
        return _view_chain(node)
    behind = {node}
    for earlier in reversed(list(node.graph.nodes)):
        if earlier in behind:
            behind.update(earlier.all_input_nodes)
    return [each for each in node.graph.nodes if each in behind and each.op != "placeholder"]


def _redo_in_backward(backward: GraphModule, redone: Mapping[Node, list[Node]]) -> None:
    """A transposed weight is no activation, nor is one made of parameters: let the backward take the forward's inputs
    and make it again."""
    placeholders = {node.name: node for node in backward.graph.nodes if node.op == "placeholder"}
    body = next(node for node in backward.graph.nodes if node.op != "placeholder")
    copies: dict[Node, Node] = {}
    for node, steps in redone.items():
        target = placeholders[node.name]
        for step in steps:
            for source in step.all_input_nodes:
                if source.op == "placeholder" and source not in copies:
                    if source.name not in placeholders:
                        with backward.graph.inserting_before(target):
                            placeholders[source.name] = backward.graph.node_copy(source)
                    copies[source] = placeholders[source.name]
            if step not in copies:
                with backward.graph.inserting_before(body):
                    copies[step] = backward.graph.node_copy(step, copies.__getitem__)
        target.replace_all_uses_with(copies[node])
        backward.graph.erase_node(target)
    backward.recompile()


def _name_crossing(
    name: str,
    forward: GraphModule,
    backward: GraphModule,
    inputs: dict[str, Tensor],
    outputs: list[str],
    parameters: set[str],
) -> tuple[Captured, Captured]:
    """Name every tensor that crosses from forward to backward, and drop those that need not leave the forward."""
    placeholders = [node.name for node in forward.graph.nodes if node.op == "placeholder"]
    source_of = dict(zip(placeholders, inputs, strict=True))
    results = _output_nodes(forward)
    kept, saved = results[: len(outputs)], results[len(outputs) :]
    names = {placeholder for placeholder, label in source_of.items() if label in parameters}
    weights = _made_of_parameters(forward, names)
    redone = {node: steps for node in saved if (steps := _redone(node, weights))}
    _redo_in_backward(backward, redone)
    saved_names: dict[Node, str] = {}
    crossing = dict(source_of)
    for node in saved:
        if node.op == "placeholder" or node in redone:
            continue
        if node in kept:
            crossing[node.name] = outputs[kept.index(node)]
        elif node.name not in crossing:
            saved_names[node] = crossing[node.name] = f"saved_{len(saved_names)}"
    _set_outputs(forward, [*kept, *saved_names])
    forward_values = {
        n: lowering.node_value(node)
        for n, node in zip([*outputs, *saved_names.values()], [*kept, *saved_names], strict=True)
    }
    forward_region = _region(f"{name}_forward", forward, inputs, forward_values)

    backward_inputs: dict[str, Tensor] = {}
    for node in [node for node in backward.graph.nodes if node.op == "placeholder"]:
        label = crossing.get(node.name, "grad_output")
        backward_inputs[label] = lowering.node_value(node)
    # one gradient for each forward input, None where it needs none, or where nothing reads it
    given = dict(zip(inputs, _output_nodes(backward), strict=True))
    unread = [name for name in inputs if name in parameters and given[name] is None and inputs[name].requires_grad]
    given |= {name: _zeros(backward, inputs[name]) for name in unread}
    gradients = {f"grad_{name}": node for name, node in given.items() if node is not None}
    _set_outputs(backward, list(gradients.values()))
    values = {label: lowering.node_value(node) for label, node in gradients.items()}
    return forward_region, _region(f"{name}_backward", backward, backward_inputs, values)


def _zeros(graph: GraphModule, like: Tensor) -> Node:
    """A new node of a graph: zeros like a fake tensor that lies row by row."""
    with graph.graph.inserting_before(graph.graph.output_node()):
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device, "pin_memory": False}
        node = graph.graph.call_function(torch.ops.aten.full.default, (list(like.shape), 0), options)
    node.meta["val"] = like.detach()
    return node


def _region(
    name: str, graph: GraphModule, inputs: dict[str, Tensor], outputs: dict[str, Tensor], mutated: Sequence[str] = ()
) -> Captured:
    fakes = [tensor.detach() for tensor in inputs.values()]
    spec = RegionSpec(
        name,
        [TensorSpec.of(label, tensor) for label, tensor in inputs.items()],
        [TensorSpec.of(label, tensor) for label, tensor in outputs.items()],
        mutated=list(mutated),
        flops=count_flops(graph),
        nodes=sum(node.op == "call_function" for node in graph.graph.nodes),
    )
    return Captured(graph, fakes, spec)


def _output_nodes(graph: GraphModule) -> list[Node]:
    results: Any = graph.graph.output_node().args[0]
    return list(results) if isinstance(results, tuple | list) else [results]


def _set_outputs(graph: GraphModule, nodes: Sequence[Node]) -> None:
    graph.graph.output_node().args = (tuple(nodes),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
