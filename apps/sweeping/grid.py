"""From axes to points: which settings each run has, what the table calls them, and the name of its folder. No torch."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from apps.sweeping.options import EXAMPLE, refuse_own
from apps.training.config_keys import keys_of, sections_of
from apps.training.config_schema import TrainConfig
from apps.training.config_yaml import written
from backends.errors import UserError

LONGEST_PART, LONGEST_NAME = 48, 120  # characters of a folder's name
# Of a path its last part says enough, as long as it is the only one of that name.
PATHS = {"checkpoint.config_name", "checkpoint.model_name_or_path", "training.dataset", "run.artifact"}
UNSAFE = re.compile(r"[^A-Za-z0-9.+_-]+")


@dataclass(frozen=True)
class Point:
    """One combination of values. `labels`: the text of each axis' value, for people; `values`: as they were given."""

    name: str
    labels: dict[str, str]
    values: dict[str, Any]
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class _Choice:
    key: str
    label: str
    value: Any


def expand(axes: Mapping[str, Any], mode: Literal["grid", "zip"]) -> list[Point]:
    """All points, the last axis changing fastest; UserError for axes without values, uneven or with equal ones."""
    refuse_own(axes)
    choices = [_choices(key, values) for key, values in axes.items()]
    if mode == "zip" and len({len(axis) for axis in choices}) > 1:
        counts = ", ".join(f"{key} {len(axis)}" for key, axis in zip(axes, choices, strict=True))
        raise UserError(
            f"sweep.mode=zip takes one value of each setting for a run, but their numbers differ: {counts}."
        )
    combinations = list(itertools.product(*choices) if mode == "grid" else zip(*choices, strict=True))
    short = short_keys(list(axes))
    names = _distinct([_name(combination, short) for combination in combinations], combinations)
    return [
        Point(
            name,
            {choice.key: choice.label for choice in combination},
            {choice.key: choice.value for choice in combination},
            tuple(argument for choice in combination for argument in _arguments(choice.key, choice.value)),
        )
        for name, combination in zip(names, combinations, strict=True)
    ]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's last part, or as many of its last parts as tell it from the others."""
    short = {}
    for key in keys:
        parts = key.removeprefix("+").split(".")
        tails = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = [f".{other.removeprefix('+')}" for other in keys if other != key]
        short[key] = next((tail for tail in tails if not any(name.endswith(f".{tail}") for name in others)), key)
    return short


def _choices(key: str, values: Any) -> list[_Choice]:
    if not isinstance(values, list | dict) or not values:
        given = json.dumps(values, default=str)
        raise UserError(f"sweep has {key}: {given}. Expected its values, a list or a mapping of names: {EXAMPLE}.")
    if isinstance(values, dict):
        choices = [_Choice(key, str(name), value) for name, value in values.items()]
    else:
        labels = [label(value) for value in values]
        if key in PATHS:
            last = [Path(text).name for text in labels]
            labels = last if len(set(last)) == len(last) else labels
        choices = [_Choice(key, text, value) for text, value in zip(labels, values, strict=True)]
    spelled = Counter(written(choice.value) if choice.value != "" else "''" for choice in choices)
    twice = [
        text for counts in (spelled, Counter(choice.label for choice in choices)) for text in counts if counts[text] > 1
    ]
    if twice:
        raise UserError(f"sweep has {key}: {twice[0]} twice. Expected different values.")
    return choices


def label(value: Any) -> str:
    """A value as a person writes it: `1e-6`, `0.1`, `true`, `bfloat16`; a list or mapping as JSON."""
    if not isinstance(value, float) or not math.isfinite(value):
        return written(value)
    if value == 0 or 0.01 <= abs(value) < 1e6:
        return repr(value)
    mantissa, _, exponent = f"{Decimal(repr(value)).normalize():e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def _arguments(key: str, value: Any) -> Iterator[str]:
    """`key=value`; the value of a whole section is a mapping of its settings."""
    if isinstance(value, Mapping) and key in sections_of(keys_of(TrainConfig)):
        for name, inner in value.items():
            yield from _arguments(f"{key}.{name}", inner)
    else:
        yield f"{key}={written(value)}"


def _name(combination: Sequence[_Choice], short: Mapping[str, str]) -> str:
    """`lr=1e-6_seed=2`: letters, digits and . + - _ = only."""
    parts = []
    for choice in combination:
        text = UNSAFE.sub("-", choice.label).strip("-.") or "value"
        if len(text) > LONGEST_PART:
            text = f"{text[:LONGEST_PART].rstrip('-.')}-{_hash(choice.label)}"
        parts.append(f"{UNSAFE.sub('-', short[choice.key])}={text}")
    name = "_".join(parts)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{_hash(name)}"


def _distinct(names: Sequence[str], combinations: Sequence[Sequence[_Choice]]) -> list[str]:
    """Names that only differ in what is left out of them, or in case, get a hash of their values behind them."""
    counts = Counter(name.lower() for name in names)
    return [
        name if counts[name.lower()] == 1 else f"{name}-{_hash(json.dumps([choice.label for choice in combination]))}"
        for name, combination in zip(names, combinations, strict=True)
    ]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
