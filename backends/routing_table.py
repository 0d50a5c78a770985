"""Layer names a person can read: `model.layers.{0-21}.mlp.{gate,up,down}_proj` for 66 of them; and text tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

# A group of names: at each dotted position the values it may have. The group is their full product.
Group = tuple[tuple[str, ...], ...]


def shorten(names: Iterable[str]) -> list[str]:
    """Fold dotted names into as few brace patterns as merging one position after another gives; exact and in order."""
    by_length: dict[int, list[Group]] = {}
    for name in names:
        parts = tuple((part,) for part in name.split("."))
        by_length.setdefault(len(parts), []).append(parts)
    shortened = []
    for length, groups in by_length.items():
        numbers = [p for p in range(length) if any(_is_number(group[p][0]) for group in groups)]
        words = [p for p in reversed(range(length)) if p not in numbers]
        for position in (*numbers, *words):
            groups = _merge(groups, position)
        shortened += [".".join(_braces(values) for values in group) for group in groups]
    return shortened


def plain_table(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Columns aligned by spaces; those in `right` to the right. The first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = set(right)
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def routed_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `Plan.to_json`, as a plan or an artifact's manifest holds them, as a text table and its sum."""
    cells = [("pattern", "backend", "count", "layers", "parameters", "FLOPs")]
    for row in rows:
        names, parameters = shorten(row["layers"]), count_text(row["parameters"])
        count, share = str(len(row["layers"])), f"{row['flops_share']:.1%}"
        cells.append((row["match"], row["backend"], count, names[0], parameters, share))
        cells += [("", "", "", name, "", "") for name in names[1:]]
    total = sum(len(row["layers"]) for row in rows)
    moved = sum(len(row["layers"]) for row in rows if row["use"] != "dense")
    return f"{plain_table(cells, right=(2, 4, 5))}\nRouted to other backends than dense: {moved} of {total} layers."


def backend_text(backend: Any) -> str:
    """A backend with the options that are not its defaults: `optical(q_levels=16)`."""
    defaults = {field.name: field.default for field in dataclasses.fields(backend.config)}
    changed = [f"{name}={value!r}" for name, value in backend.options().items() if value != defaults.get(name)]
    return f"{backend.name}({', '.join(changed)})" if changed else backend.name


def count_text(value: float) -> str:
    """1234567 → '1.23 M'."""
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {unit}"
    return f"{value:.0f}"


def _merge(groups: list[Group], position: int) -> list[Group]:
    """Join the groups that differ at `position` only."""
    values_of: dict[Group, dict[str, None]] = {}
    for group in groups:
        others = (*group[:position], *group[position + 1 :])
        values_of.setdefault(others, {}).update(dict.fromkeys(group[position]))
    return [(*others[:position], tuple(values), *others[position:]) for others, values in values_of.items()]


def _braces(values: tuple[str, ...]) -> str:
    if len(values) == 1:
        return values[0]
    numbers = sorted(int(value) for value in values if _is_number(value))
    words = [value.split("_") for value in values if not _is_number(value)]
    prefix: list[str] = []
    suffix: list[str] = []
    if not numbers:
        while min(map(len, words)) > 1 and len({word[0] for word in words}) == 1:
            prefix.append(words[0][0])
            words = [word[1:] for word in words]
        while min(map(len, words)) > 1 and len({word[-1] for word in words}) == 1:
            suffix.insert(0, words[0][-1])
            words = [word[:-1] for word in words]
    inside = ",".join([*_ranges(numbers), *("_".join(word) for word in words)])
    return "_".join([*prefix, f"{{{inside}}}", *suffix])


def _ranges(numbers: list[int]) -> list[str]:
    """[0, 1, 2, 5] → ['0-2', '5']."""
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def _is_number(text: str) -> bool:
    return text.isdecimal() and str(int(text)) == text
