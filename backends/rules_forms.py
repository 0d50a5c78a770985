"""The forms a rules file may have (see rules_file.py), each turned into rules as `backend.rules` has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from backends import available
from backends.errors import UserError, unknown
from backends.routing_rules import OWN_KEYS, Rule

BACKEND = "optical"  # the one whose options stand in the forms that name none


@dataclasses.dataclass(frozen=True, kw_only=True)
class RulesFile:
    """What a file says: `route(model, file.rules, file.default or "dense")` does it."""

    name: str
    rules: tuple[dict[str, Any], ...]  # each as `backend.rules` has it
    default: str | dict[str, Any] | None = None  # as `backend.default` has it; None: the file leaves it open
    lora: dict[str, float] | None = None  # settings "r" (0: off) and "alpha", if given; None: the file is not about it


def own_form(content: Mapping[str, Any], name: str) -> RulesFile:
    """rules: [{match, use, option, …}], default: NAME or {use: NAME, option, …}."""
    _known_keys(content, ("rules", "default"), f"key of rules file {name}")
    rules, default = content["rules"], content.get("default")
    if not isinstance(rules, list) or not (rules or default):
        raise UserError(
            f"Key 'rules' of rules file {name} is {rules!r}. Expected a list of "
            "{match: PATTERN, use: BACKEND, option: value, ...}."
        )
    for number, rule in enumerate(rules):
        with_origin = {**rule, "origin": name} if isinstance(rule, Mapping) else rule
        _check(Rule.from_mapping, with_origin, f"Rule {number} of rules file {name}")
    if default is not None:
        _check(Rule.of_default, default, f"Key 'default' of rules file {name}")
    if isinstance(default, Mapping):
        default = {**default, "origin": name}
    return RulesFile(name=name, rules=tuple({**rule, "origin": name} for rule in rules), default=default)


def by_name_form(content: Mapping[str, Any], name: str) -> RulesFile:
    """use_regex, layer_name_to_config: {NAME or regular expression: {option: value} or null}."""
    _known_keys(content, ("use_regex", "layer_name_to_config"), f"key of rules file {name}")
    use_regex, by_name = content.get("use_regex", False), content["layer_name_to_config"]
    if not isinstance(use_regex, bool):
        raise UserError(f"Key 'use_regex' of rules file {name} is {use_regex!r}. Expected true or false.")
    if not isinstance(by_name, Mapping) or not by_name:
        raise UserError(
            f"Key 'layer_name_to_config' of rules file {name} is {by_name!r}. Expected layer names, each with a "
            "mapping of options, or null to leave the layer alone."
        )
    rules, default = [], {"use": "dense"}
    for layer, options in by_name.items():
        where = f"Key '{layer}' of rules file {name}"
        if not isinstance(layer, str):
            raise UserError(f"{where} is no text. Expected a layer name.")
        backend = _backend_of(options, where)
        if layer == "default":
            default = {**backend, "origin": name}
        else:
            rule = {"match": layer, "syntax": "regex" if use_regex else "exact", **backend, "origin": name}
            Rule.from_mapping(rule)  # refuses what is no regular expression
            rules.append(rule)
    return RulesFile(name=name, rules=tuple(rules), default="dense" if default["use"] == "dense" else default)


def global_form(content: Mapping[str, Any], name: str) -> RulesFile:
    """use_lora, [attention], [fc], [lora]."""
    _known_keys(content, ("use_lora", "attention", "fc", "lora"), f"key of rules file {name}")
    rules = []
    for section, kind in (("attention", "attention"), ("fc", "linear")):
        if section in content:
            where = f"Section [{section}] of rules file {name}"
            backend = _backend_of(_section(content[section], where), where)
            rules.append({"match": "*", "only": kind, **backend, "origin": f"{name} [{section}]"})
    return RulesFile(name=name, rules=tuple(rules), default="dense", lora=_lora(content, name))


def _lora(content: Mapping[str, Any], name: str) -> dict[str, float]:
    """`use_lora` and [lora] as settings of the trainer; rank 0 where LoRA is not used."""
    where, use = f"Section [lora] of rules file {name}", content.get("use_lora", False)
    if not isinstance(use, bool):
        raise UserError(f"Key 'use_lora' of rules file {name} is {use!r}. Expected true or false.")
    given = _section(content.get("lora", {}), where)
    _known_keys(given, ("r", "lora_alpha"), f"key of [lora] in rules file {name}")
    for key, kinds, expected in (("r", int, "a whole number"), ("lora_alpha", int | float, "a number")):
        value = given.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf:
            raise UserError(f"{where} has {key} = {value!r}. Expected {expected} above 0.")
    if not use:
        return {"r": 0}
    if "r" not in given:
        raise UserError(f"{where} has no r, but use_lora is true. Expected a rank, for example r = 32.")
    return {"r": given["r"]} | ({"alpha": float(given["lora_alpha"])} if "lora_alpha" in given else {})


def _backend_of(options: Any, where: str) -> dict[str, Any]:
    """{q_levels: 16} → {use: optical, q_levels: 16}; null → {use: dense}."""
    if options is None:
        return {"use": "dense"}
    if not isinstance(options, Mapping):
        raise UserError(f"{where} is {options!r}. Expected a mapping of options, or null to leave the layer alone.")
    for key in options:
        if not isinstance(key, str) or key in OWN_KEYS:
            raise UserError(f"{where} has the key {key!r}. Expected options of the {BACKEND} backend only.")
    return {"use": BACKEND, **options}


def _section(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}. Expected a mapping of options.")
    return value


def _known_keys(content: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    for key in content:
        if key not in known:
            raise unknown(what, str(key), known)


def _check(read: Any, given: Any, where: str) -> None:
    """Refuse, with the place in front, what no rule is read from and a backend that is not there."""
    try:
        use = read(given).use
        if ":" not in use and use not in available():
            raise unknown("backend", use, available())
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
