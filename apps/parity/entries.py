"""What `backends=[…]` says, checked as far as it can be without PyTorch.

An entry is a backend's name, `package.module:Class`, a backend with options `{use: optical, q_levels: 64}`, or rules as
a run takes them: `{rules: [{match: '*.mlp.*', use: optical}], default: dense}`, `{rules_file: optical.yaml}`. A mapping
may have a `name` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import backends
from backends.errors import UserError, did_you_mean, unknown
from backends.routing_rules import Rule
from backends.rules_file import read_rules

FORMS = (
    "Expected a backend's name, package.module:Class, {use: BACKEND, OPTION: VALUE}, {rules: [{match: PATTERN, "
    "use: BACKEND}]} or {rules_file: FILE}."
)


@dataclass(frozen=True)
class Entry:
    """One way to route the model, as `route` takes it, and what the report calls it."""

    name: str
    rules: tuple[Mapping[str, Any], ...] = ()
    default: str | Mapping[str, Any] = "dense"


def read_entries(given: Sequence[Any], at_least: int = 2) -> list[Entry]:
    """The entries of `backends=[…]`, each under a name of its own. Raises UserError for one of no known form."""
    if len(given) < at_least:
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
        return _checked(Entry(_short(value), default=value), place)
    if not isinstance(value, Mapping):
        raise UserError(f"{place} is {value!r}. {FORMS}")
    given = dict(value)
    name = given.pop("name", None)
    if name is not None and not (isinstance(name, str) and name):
        raise UserError(f"{place} has the name {name!r}. Expected a text.")
    readers = {"use": _of_backend, "rules": _of_rules, "rules_file": _of_file}
    forms = [form for form in readers if form in given]
    if len(forms) != 1:
        found = f"has both {' and '.join(forms)}" if forms else f"is {value!r}"
        near = "" if forms else next(filter(None, (did_you_mean(str(key), readers) for key in given)), "")
        raise UserError(f"{place} {found}.{near} {FORMS}")
    entry = readers[forms[0]](given, place)
    return _checked(replace(entry, name=name or entry.name), place)


def _of_backend(given: dict[str, Any], place: str) -> Entry:
    """A backend with options for every layer it computes but the head, which keeps to dense."""
    if not isinstance(given["use"], str):
        raise UserError(f"{place} has use={given['use']!r}. {FORMS}")
    options = ", ".join(f"{key}={value}" for key, value in given.items() if key != "use")
    name = _short(given["use"])
    return Entry(f"{name}({options})" if options else name, default=given)


def _of_rules(given: dict[str, Any], place: str) -> Entry:
    for key in given:
        if key not in ("rules", "default"):
            raise unknown(f"key in {place}", str(key), ("name", "rules", "default"))
    rules, default = given["rules"], given.get("default", "dense")
    if not isinstance(rules, list):
        raise UserError(f"{place} has rules={rules!r}. {FORMS}")
    used = [rule["use"] for rule in rules if isinstance(rule, Mapping) and isinstance(rule.get("use"), str)]
    names = ", ".join(dict.fromkeys(map(_short, used)))
    return Entry(f"rules ({names})", rules=tuple(rules), default=default)


def _of_file(given: dict[str, Any], place: str) -> Entry:
    """What a rules file says of backends. Adapters that it may ask a trainer for start at zero and change nothing."""
    for key in given:
        if key != "rules_file":
            raise unknown(f"key in {place}", str(key), ("name", "rules_file"))
    if not isinstance(given["rules_file"], str):
        raise UserError(f"{place} has rules_file={given['rules_file']!r}. {FORMS}")
    file = read_rules(given["rules_file"])
    return Entry(Path(file.name).name, rules=file.rules, default=file.default or "dense")


def _checked(entry: Entry, place: str) -> Entry:
    """`entry`, its rules of the right form and its backends there; their options are checked with the model."""
    read: list[tuple[str, Callable[[Any], Rule], Any]] = [(place, Rule.of_default, entry.default)]
    read += [(f"{place}.rules[{number}]", Rule.from_mapping, rule) for number, rule in enumerate(entry.rules)]
    for where, reader, given in read:
        try:
            name = reader(given).use
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if ":" not in name and name not in backends.available():
            raise unknown("backend", name, backends.available())
    return entry


def _short(backend: str) -> str:
    """`Class` for `package.module:Class`: what a column of a table has room for."""
    return backend.rpartition(":")[2]
