"""A routing rule and the layers it names. Imports no torch: settings are checked with it.

A rule is `{match: PATTERN, use: BACKEND, option: value, ...}`. PATTERN is a glob over a layer's full dotted name (`*`
also crosses dots, `?` and `[0-3]` as in a shell): `*.mlp.*` takes the MLP's linears, `*.self_attn` the attention
products, `*.self_attn.*` the linears inside attention. With `syntax: regex` it is a regular expression that has to
match the whole name, with `syntax: exact` the name itself; `only: linear` or `only: attention` narrows a rule to one
kind of layer. The language-model head (any layer with `lm_head` in its path) is taken only by a pattern that spells
`lm_head` out (`lm_head`, `*lm_head`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, get_args

from backends.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from backends.base import Backend

HEAD = "lm_head"
Kind = Literal["linear", "attention"]
Syntax = Literal["glob", "regex", "exact"]
# What a rule says about itself; every other key is an option of its backend.
OWN_KEYS = ("match", "use", "syntax", "only", "origin")
FORM = "Expected {match: PATTERN, use: BACKEND, option: value, ...}."


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerInfo:
    """What a plan needs to know of a layer; `flops_per_token` of its products in the forward, in dense arithmetic.

    `stored_for`: the backend whose parameters a linear layer holds in place of a weight; it cannot change to another.
    """

    kind: Kind
    in_features: int
    out_features: int
    parameters: int
    flops_per_token: float
    bias: bool = False
    stored_for: Backend | None = None

    def parameters_with(self, backend: Backend) -> int:
        """Numbers that the layer holds when `backend` computes it."""
        if self.kind == "attention" or self.stored_for is not None:
            return self.parameters
        spec = backend.parameter_spec(self.in_features, self.out_features, self.bias)
        return self.parameters if spec is None else sum(math.prod(shape) for shape in spec.values())

    def flops_with(self, backend: Backend) -> float:
        """FLOPs of a token when `backend` computes the layer."""
        if self.kind == "attention":
            return self.flops_per_token
        return backend.cost(1, self.in_features, self.out_features).flops


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layers whose name matches go to the backend called `use`, built with `options`.

    `origin` is the file the rule was written in, for errors; it decides nothing.
    """

    match: str
    use: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    syntax: Syntax = "glob"
    only: Kind | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        for key, kinds in (("syntax", get_args(Syntax)), ("only", (*get_args(Kind), None))):
            given, choices = getattr(self, key), [kind for kind in kinds if kind]
            if given not in kinds:
                near = did_you_mean(str(given), choices)
                raise UserError(f"{self} has {key}={given!r}. Expected {' or '.join(choices)}.{near}")
        if self.syntax == "regex":
            try:
                re.compile(self.match)
            except re.error as error:
                raise UserError(
                    f"{self} is no regular expression: {error}. Expected one that matches whole layer names, "
                    r"for example '.*\.mlp\..*'."
                ) from None

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Rule:
        """Read one entry of `backend.rules`."""
        if not isinstance(given, Mapping):
            raise UserError(f"A routing rule is {given!r}. {FORM}")
        for key in ("match", "use"):
            if not isinstance(given.get(key), str):
                near = did_you_mean(key, [name for name in given if name not in OWN_KEYS])
                near = near.replace("Did you mean", "Is it what you meant by") if near else ""
                raise UserError(f"Routing rule {dict(given)} has no text for '{key}'.{near} {FORM}")
        own = {key: given[key] for key in OWN_KEYS if key in given}
        return cls(**own, options=_options(given))

    @classmethod
    def of_default(cls, given: str | Mapping[str, Any]) -> Rule:
        """What `backend.default` says, a backend's name or {use: BACKEND, option: value, ...}, as a rule for all."""
        if isinstance(given, str):
            return cls("(default)", given)
        is_mapping = isinstance(given, Mapping) and isinstance(given.get("use"), str)
        if not is_mapping or {"match", "syntax", "only"} & set(given):
            raise UserError(
                f"The default backend is {given!r}. Expected a backend's name or {{use: BACKEND, option: value, ...}}."
            )
        return cls("(default)", given["use"], _options(given), origin=given.get("origin", ""))

    def __str__(self) -> str:
        if self.match == "(default)":
            return "The default backend" + (f" of {self.origin}" if self.origin else "")
        return f"Routing rule '{self.match}'" + (f" of {self.origin}" if self.origin else "")

    @property
    def pattern(self) -> str:
        """The pattern as tables show it: `* (linear)` for a rule that names one kind only."""
        return f"{self.match} ({self.only})" if self.only else self.match

    def matches(self, layer: str) -> bool:
        """Whether the pattern covers the layer's full name, the head like any other."""
        if self.syntax == "regex":
            return re.fullmatch(self.match, layer) is not None
        return layer == self.match if self.syntax == "exact" else fnmatchcase(layer, self.match)

    def names(self, layer: str, kind: Kind) -> bool:
        """Whether the rule means the layer: name, kind, and the head's exception."""
        spelt_out = HEAD in self.match or not is_head(layer)
        return spelt_out and self.only in (None, kind) and self.matches(layer)


def is_head(layer: str) -> bool:
    """Whether a layer belongs to the language-model head."""
    return HEAD in layer.split(".")


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    for key in given:
        if not isinstance(key, str):
            raise UserError(f"Routing rule {dict(given)} has the option {key!r}. {FORM}")
    return {key: value for key, value in given.items() if key not in OWN_KEYS}
