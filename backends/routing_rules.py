"""A routing rule, the layers it names, and what to tell who wrote one that takes no layer.

A rule is `{match: PATTERN, use: BACKEND, option: value, ...}`. PATTERN is a glob over a layer's full dotted name (`*`
also crosses dots, `?` and `[0-3]` as in a shell): `*.mlp.*` takes the MLP's linears, `*.self_attn` the attention
products, `*.self_attn.*` the linears inside attention. The language-model head (any layer with `lm_head` in its path)
is taken only by a pattern that spells `lm_head` out (`lm_head`, `*lm_head`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from fnmatch import fnmatchcase
from typing import Any, Literal

from backends.base import Backend
from backends.errors import UserError, did_you_mean
from backends.routing_table import shorten

HEAD = "lm_head"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a plan needs to know of a layer; `flops_per_token` of its products in the forward, in dense arithmetic."""

    kind: Literal["linear", "attention"]
    in_features: int
    out_features: int
    parameters: int
    flops_per_token: float


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layers whose name matches go to the backend called `use`, built with `options`."""

    match: str
    use: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Rule:
        """Read one entry of `backend.rules`."""
        form = "Expected {match: PATTERN, use: BACKEND, option: value, ...}."
        if not isinstance(given, Mapping):
            raise UserError(f"A routing rule is {given!r}. {form}")
        for key in ("match", "use"):
            if not isinstance(given.get(key), str):
                near = did_you_mean(key, [name for name in given if name not in ("match", "use")])
                near = near.replace("Did you mean", "Is it what you meant by") if near else ""
                raise UserError(f"Routing rule {dict(given)} has no text for '{key}'.{near} {form}")
        return cls(given["match"], given["use"], {k: v for k, v in given.items() if k not in ("match", "use")})

    def names(self, layer: str) -> bool:
        """Whether the pattern covers the layer's full name, the head's exception included."""
        return fnmatchcase(layer, self.match) and (HEAD in self.match or not is_head(layer))


def is_head(layer: str) -> bool:
    """Whether a layer belongs to the language-model head."""
    return HEAD in layer.split(".")


def takes_nothing(
    rule: Rule, backend: Backend, layers: Mapping[str, LayerInfo], taken_before: Mapping[str, Iterable[str]]
) -> UserError:
    """Say why a rule takes no layer, and what to type instead. `taken_before`: pattern → layers of earlier rules."""
    given = f"Routing rule '{rule.match}' → {backend}"
    matched = [name for name in layers if rule.names(name)]
    computable = [name for name in matched if backend.computes(layers[name].kind)]
    if computable:
        takers = [f"'{match}'" for match, names in taken_before.items() if set(names) & set(computable)]
        return UserError(
            f"{given} takes no layer: {' and '.join(takers)} before it took all {len(computable)} that it matches "
            "(the first match wins). Put it first, or remove it."
        )
    if matched:
        kind = layers[matched[0]].kind
        return UserError(f"{given} takes no layer: it matches {kind} layers only, which this backend does not compute.")
    if any(fnmatchcase(name, rule.match) for name in layers):
        return UserError(f"{given} takes no layer: it matches the head only, and a rule for that must name '{HEAD}'.")
    return UserError(f"{given} matches no layer. Near it: {_nearest(rule.match, layers)}.")


def _nearest(pattern: str, layers: Iterable[str]) -> str:
    """Up to three groups of layers whose path has parts that look like those the pattern spells out."""

    def likeness(name: str) -> float:
        parts = name.split(".")
        return sum(max(SequenceMatcher(None, word, part).ratio() for part in parts) for word in words)

    words = [word for word in re.split(r"[.*?]+", pattern) if word]
    names = sorted(layers, key=likeness, reverse=True)
    best = [name for name in names if likeness(name) == likeness(names[0])]
    return ", ".join(shorten(best)[:3]) or "nothing, for the model has no linear or attention layer"
