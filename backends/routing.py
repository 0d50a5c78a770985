"""Which backend computes which layer: rules in, a plan out, applied to a model in place.

The first rule that matches a layer takes it; a backend that computes no attention leaves attention layers to later
rules. What no rule takes goes to the default, the head (which the default does not move) to dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from backends import load
from backends.base import Backend
from backends.errors import UserError
from backends.layers import BackendAttention, BackendLinear, shapes_stored, unfuse
from backends.routing_errors import takes_nothing
from backends.routing_rules import LayerInfo, Rule, is_head
from backends.routing_table import backend_text, routed_table

__all__ = ["LayerInfo", "Plan", "Route", "Rule", "layers_of", "plan", "route"]


@dataclasses.dataclass(frozen=True)
class Route:
    """One row of a plan: the layers a rule took (or "(default)" and "(dense)": those that none did)."""

    match: str
    backend: Backend
    layers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every layer in exactly one route."""

    layers: Mapping[str, LayerInfo]
    routes: tuple[Route, ...]

    def backend_of(self, layer: str) -> Backend:
        """The backend that computes `layer`."""
        return next(route.backend for route in self.routes if layer in route.layers)

    def table(self) -> str:
        """Pattern, backend, count, layers, parameters, share of the routed layers' FLOPs, as text."""
        return routed_table(self.to_json())

    def to_json(self) -> list[dict[str, Any]]:
        """What an artifact's manifest stores: rows with the backend's name, options and source fingerprint."""
        flops = {
            route: sum(self.layers[name].flops_with(route.backend) for name in route.layers) for route in self.routes
        }
        total = sum(flops.values()) or 1.0
        rows = []
        for route in self.routes:
            infos = [self.layers[name] for name in route.layers]
            rows.append(
                {
                    "match": route.match,
                    "use": route.backend.name,
                    "options": route.backend.options(),
                    "backend": backend_text(route.backend),
                    "fingerprint": route.backend.fingerprint(),
                    "layers": list(route.layers),
                    "parameters": sum(info.parameters_with(route.backend) for info in infos),
                    "flops_share": flops[route] / total,
                }
            )
        return rows


def plan(
    layers: Mapping[str, LayerInfo],
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    default: str | Mapping[str, Any] = "dense",
) -> Plan:
    """Assign a backend to every layer. Pure: the same arguments give an equal plan, and nothing is changed.

    `default`: a backend's name, or {use: NAME, option: value, ...}. A rule that takes no layer is a UserError: a
    misspelt pattern must not train a dense model in silence.
    """
    left = dict(layers)
    routes: list[Route] = []
    for given in rules:
        rule = given if isinstance(given, Rule) else Rule.from_mapping(given)
        backend = _backend_of(rule)
        taken = tuple(
            name for name, info in left.items() if rule.names(name, info.kind) and backend.computes(info.kind)
        )
        if not taken:
            raise takes_nothing(rule, backend, layers, {route.match: route.layers for route in routes})
        routes.append(Route(rule.pattern, backend, taken))
        for name in taken:
            del left[name]
    for backend in dict.fromkeys(info.stored_for for info in left.values() if info.stored_for is not None):
        kept = tuple(name for name, info in left.items() if info.stored_for == backend)
        routes.append(Route("(as stored)", backend, kept))
        left = {name: info for name, info in left.items() if name not in kept}
    fallback, dense = _backend_of(Rule.of_default(default)), load("dense")
    # Where anything leaves dense, a head that stays gets a row of its own, so that the table shows it.
    apart = any(row.backend != dense for row in routes) or fallback != dense
    heads = tuple(name for name in left if apart and is_head(name))
    defaulted = tuple(name for name, info in left.items() if fallback.computes(info.kind) and name not in heads)
    others = tuple(name for name in left if name not in (*defaulted, *heads))
    for label, backend, names in (
        ("(default)", fallback, defaulted),
        ("(dense)", dense, others),
        ("(head, left alone)", dense, heads),
    ):
        if names:
            routes.append(Route(label, backend, names))
    return Plan(dict(layers), tuple(routes))


def route(
    model: nn.Module,
    rules: Sequence[Rule | Mapping[str, Any]] = (),
    default: str | Mapping[str, Any] = "dense",
    *,
    sequence_length: int | None = None,
) -> Plan:
    """Route every plain nn.Linear, BackendLinear and BackendAttention of any torch model, in place.

    Plain linears change their class and keep everything else: weights, names, hooks, ties. Works on meta and fake
    tensors. A UserError leaves the model as it was. `sequence_length` only weighs attention in the table; by default
    it is the `max_seq_length` or `max_position_embeddings` of the model's config.
    """
    if sequence_length is None:
        config = getattr(model, "config", None)
        lengths = (getattr(config, name, None) for name in ("max_seq_length", "max_position_embeddings"))
        sequence_length = next((length for length in lengths if length), 0)
    planned = plan(layers_of(model, sequence_length), rules, default)
    _require_possible(model, planned)
    unfuse(model)
    for one in planned.routes:
        for name in one.layers:
            layer = model.get_submodule(name)
            if type(layer) is nn.Linear:
                layer = BackendLinear.adopt(layer)
            assert isinstance(layer, BackendLinear | BackendAttention)
            layer.set_backend(one.backend)
            layer.set_layer_name(name)
    return planned


def layers_of(model: nn.Module, sequence_length: int = 0) -> dict[str, LayerInfo]:
    """The routable layers of a model by full name. Other subclasses of nn.Linear are left alone."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BackendLinear) or type(module) is nn.Linear:
            if type(module) is nn.Linear and "forward" in vars(module):
                raise UserError(
                    f"Layer '{name}' has had its forward replaced (by accelerate or a tracer), which would bypass its "
                    "backend. Route the model before it is prepared."
                )
            found[name] = _linear_info(module)
        elif isinstance(module, BackendAttention):
            width = module.num_heads * module.head_dim
            # Two products over a causal context of half the sequence on average.
            flops = 2 * 2.0 * width * sequence_length / 2
            found[name] = LayerInfo(
                kind="attention", in_features=width, out_features=width, parameters=0, flops_per_token=flops
            )
    return found


def _require_possible(model: nn.Module, planned: Plan) -> None:
    """Whether each layer can store what its backend asks for, before the first one is changed."""
    for one in planned.routes:
        for name in one.layers:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                continue
            try:
                shapes_stored(layer, one.backend)
            except UserError as error:
                raise UserError(f"{Rule(one.match, one.backend.name)}, layer '{name}': {error}") from error


def _linear_info(layer: nn.Linear) -> LayerInfo:
    return LayerInfo(
        kind="linear",
        in_features=layer.in_features,
        out_features=layer.out_features,
        parameters=sum(parameter.numel() for parameter in layer.parameters()),
        flops_per_token=2.0 * layer.in_features * layer.out_features,
        bias=layer.bias is not None,
        stored_for=layer.backend if isinstance(layer, BackendLinear) and layer.stored is not None else None,
    )


def _backend_of(rule: Rule) -> Backend:
    """The rule's backend; a mistake in its options names the file the rule stands in, if it stands in one."""
    try:
        return load(rule.use, **rule.options)
    except UserError as error:
        if not rule.origin:
            raise
        raise UserError(f"{rule}: {error}") from error
