"""What to tell who wrote a rule that takes no layer: why, and what to type instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

from backends.errors import UserError
from backends.routing_rules import HEAD, LayerInfo, Rule
from backends.routing_table import backend_text, shorten

if TYPE_CHECKING:
    from backends.base import Backend

# Parts of a regular expression that spell nothing: escapes such as \d, sets such as [0-9], counts such as {2}.
_NOT_SPELT = re.compile(r"\\[a-zA-Z]|\[[^\]]*\]|\{[^}]*\}")


def takes_nothing(
    rule: Rule, backend: Backend, layers: Mapping[str, LayerInfo], taken_before: Mapping[str, Iterable[str]]
) -> UserError:
    """Say why a rule takes no layer. `taken_before`: pattern → layers of earlier rules."""
    given = f"{rule} → {backend_text(backend)}"
    matched = [name for name, info in layers.items() if rule.names(name, info.kind)]
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
    covered = [name for name in layers if rule.matches(name)]
    if rule.only and all(layers[name].kind != rule.only for name in covered):
        there = f"it matches {layers[covered[0]].kind} layers only" if covered else "it matches nothing"
        return UserError(f"{given} takes no layer: {there}, and it asks for only: {rule.only}.")
    if covered:
        return UserError(f"{given} takes no layer: it matches the head only, and a rule for that must name '{HEAD}'.")
    return UserError(f"{given} matches no layer. {_whole_name(rule, layers)}Near it: {_nearest(rule, layers)}.")


def _whole_name(rule: Rule, layers: Iterable[str]) -> str:
    """What is wrong with a pattern that is right but for its syntax, or ""."""
    if rule.syntax == "regex" and any(re.search(rule.match, name) for name in layers):
        return "A regular expression has to match the whole name, this one matches a part. "
    if rule.syntax == "exact" and re.search(r"[\\*?+|()\[\]]", rule.match):
        return "It is compared as a name here, not as a pattern (use_regex: true or syntax: regex). "
    return ""


def _nearest(rule: Rule, layers: Iterable[str]) -> str:
    """Up to three groups of layers whose path has parts that look like those the pattern spells out."""

    def likeness(name: str) -> float:
        parts = name.split(".")
        return sum(max(SequenceMatcher(None, word, part).ratio() for part in parts) for word in words)

    pattern = rule.match if rule.syntax == "glob" else _NOT_SPELT.sub(".", rule.match)
    words = [word for word in re.split(r"[^\w-]+", pattern) if len(word) > 1 or rule.syntax == "exact"]
    names = sorted(layers, key=likeness, reverse=True)
    best = [name for name in names if likeness(name) == likeness(names[0])]
    return ", ".join(shorten(best)[:3]) or "nothing, for the model has no linear or attention layer"
