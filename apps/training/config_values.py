"""One given value in the type of its key. omegaconf converts and checks it against the key's annotation."""

import dataclasses
import json
import math
from datetime import date
from typing import Any, get_origin

from apps.training.config_arguments import Assignment
from apps.training.config_keys import Key
from backends.errors import UserError, did_you_mean
from backends.yaml_reading import parse_yaml


def convert(key: Key, item: Assignment) -> Any:
    """The assigned value in the key's type; UserError when it does not fit the type or the range."""
    value = item.value
    if not item.origin:
        value = _read_text(key, value)
    elif isinstance(value, bool) and "on" in key.choices:
        value = "on" if value else "off"  # YAML reads a bare on as true
    if value is None and key.optional:
        return None
    if key.choices or (isinstance(value, str) and str in key.members):
        if key.choices and value not in key.choices:
            raise _wrong_value(key, item)
        return value
    return _checked_by_omegaconf(key, item, value)


def _checked_by_omegaconf(key: Key, item: Assignment, value: Any) -> Any:
    from omegaconf import OmegaConf  # a fifth of the time that --help takes, which reads no value
    from omegaconf.errors import OmegaConfBaseException

    # omegaconf has no unions with a mapping in them
    mappings = [kind for kind in key.members if get_origin(kind) is dict and isinstance(value, dict)]
    box = OmegaConf.structured(dataclasses.make_dataclass("Box", [("value", mappings[0] if mappings else key.type)]))
    try:
        OmegaConf.update(box, "value", _dates_as_text(value))
        converted = OmegaConf.to_container(box)["value"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, OverflowError):  # of a whole number where a float is asked for
        raise _wrong_value(key, item) from None
    if isinstance(converted, str) and key.plain_type is not str:  # "${x}": a reference, which settings do not have
        raise _wrong_value(key, item)
    if isinstance(converted, float | int) and not isinstance(converted, bool) and not _in_range(converted, key):
        raise _wrong_value(key, item)
    return converted


def _read_text(key: Key, text: str) -> Any:
    """What a command-line text spells: itself for a text or a choice, else YAML."""
    if not text and not key.allow_empty:
        null = f", or {key.path}=null to unset it" if key.optional else ""
        raise UserError(f"'{key.path}=' has no value. Expected {key.expected}{null}.")
    if text == "null":
        return None
    return text if key.choices or key.plain_type is str else parse_yaml(text, f"{key.path}={text}")


def _dates_as_text(value: Any) -> Any:
    """`value` with the dates that YAML has read, which no setting is, as texts: logging.tags=[2024-12-05]."""
    if isinstance(value, list):
        return [_dates_as_text(each) for each in value]
    return value.isoformat() if isinstance(value, date) else value


def _in_range(value: float, key: Key) -> bool:
    return (
        abs(value) < (2**64 if isinstance(value, int) else math.inf)  # a whole number fits 64 bits
        and (key.above is None or value > key.above)
        and (key.at_least is None or value >= key.at_least)
        and (key.below is None or value < key.below)
        and (key.at_most is None or value <= key.at_most)
    )


def _wrong_value(key: Key, item: Assignment) -> UserError:
    given = item.value if isinstance(item.value, str) and not item.origin else json.dumps(item.value, default=str)
    near = did_you_mean(str(item.value), map(str, key.choices))
    return UserError(f"Wrong value {key.path}={given}{item.origin}. Expected {key.expected}.{near}")
