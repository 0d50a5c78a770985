"""What `backends=[…]` says, checked as far as it can be without PyTorch.

An entry is a backend's name, `package.module:Class`, a backend with options `{use: optical, q_levels: 64}`, or rules as
a run takes them: `{rules: [{match: '*.mlp.*', use: optical}], default: dense}`. A mapping may have a `name` of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import backends
from backends.errors import UserError, did_you_mean, unknown

FORMS = (
    "Expected a backend's name, package.module:Class, {use: BACKEND, OPTION: VALUE} or {rules: [{match: PATTERN, "
    "use: BACKEND}]}."
)
_RULES_KEYS = ("rules", "default")


@dataclass(frozen=True)
class Entry:
    """One way to route the model, and what the report calls it."""

    name: str
    rules: tuple[Mapping[str, Any], ...] = ()
    default: str = "dense"


def read_entries(given: Sequence[Any]) -> list[Entry]:
    """The entries of `backends=[…]`, each under a name of its own. Raises UserError for one of no known form."""
    if len(given) < 2:
        raise UserError(
            f"backends has {len(given)} entr{'y' if len(given) == 1 else 'ies'}. Expected two at least, the reference "
            "first: backends='[dense, optical]'."
        )
    entries: list[Entry] = []
    for number, value in enumerate(given):
        entry = _entry(value, f"backends[{number}]")
        taken = [other.name for other in entries]
        if entry.name in taken:
            again = next(n for n in range(2, len(taken) + 2) if f"{entry.name} #{n}" not in taken)
            entry = replace(entry, name=f"{entry.name} #{again}")
        entries.append(entry)
    return entries


def _entry(value: Any, place: str) -> Entry:
    if isinstance(value, str):
        _check_backend(value)
        return Entry(_short(value), default=value)
    if not isinstance(value, Mapping):
        raise UserError(f"{place} is {value!r}. {FORMS}")
    given = dict(value)
    name = given.pop("name", None)
    if name is not None and not (isinstance(name, str) and name):
        raise UserError(f"{place} has the name {name!r}. Expected a text.")
    forms = [form for form in ("use", "rules") if form in given]
    if len(forms) != 1:
        found = f"has both {' and '.join(forms)}" if forms else f"is {value!r}"
        near = "" if forms else next(filter(None, (did_you_mean(str(key), ("use", "rules")) for key in given)), "")
        raise UserError(f"{place} {found}.{near} {FORMS}")
    entry = _of_backend(given, place) if forms == ["use"] else _of_rules(given, place)
    return replace(entry, name=name or entry.name)


def _of_backend(given: dict[str, Any], place: str) -> Entry:
    """A backend with options for every layer it computes but the head, which keeps to dense as it does by default."""
    backend = given["use"]
    if not isinstance(backend, str):
        raise UserError(f"{place} has use={backend!r}. {FORMS}")
    _check_backend(backend)
    options = ", ".join(f"{key}={value}" for key, value in given.items() if key != "use")
    return Entry(f"{_short(backend)}({options})" if options else _short(backend), rules=({"match": "*", **given},))


def _of_rules(given: dict[str, Any], place: str) -> Entry:
    for key in given:
        if key not in _RULES_KEYS:
            raise unknown(f"key in {place}", str(key), ("name", *_RULES_KEYS))
    rules, default = given["rules"], given.get("default", "dense")
    if not isinstance(rules, list) or not isinstance(default, str):
        raise UserError(f"{place} has rules={rules!r} and default={default!r}. {FORMS}")
    for number, rule in enumerate(rules):
        if not (isinstance(rule, Mapping) and all(isinstance(rule.get(key), str) for key in ("match", "use"))):
            raise UserError(
                f"{place}.rules[{number}] is {rule!r}. Expected {{match: 'PATTERN', use: BACKEND, OPTION: VALUE}}."
            )
    for backend in (default, *(rule["use"] for rule in rules)):
        _check_backend(backend)
    used = dict.fromkeys(_short(rule["use"]) for rule in rules)
    return Entry(f"rules ({', '.join(used)})" if used else _short(default), rules=tuple(rules), default=default)


def _short(backend: str) -> str:
    """`Class` for `package.module:Class`: what a column of a table has room for."""
    return backend.rpartition(":")[2]


def _check_backend(name: str) -> None:
    if ":" not in name and name not in backends.available():
        raise unknown("backend", name, backends.available())
