"""Settings of a benchmark: its own, and beside them those of train_llm.py where it takes them."""

from collections.abc import Mapping, Sequence

from backends.errors import UserError, unknown


def own_and_others(defaults: Mapping[str, str], arguments: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """`name=value` arguments over their defaults, and those that have none, as text. UserError without a value."""
    own, others = dict(defaults), dict[str, str]()
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"Setting {name} has no value. Expected {name}=VALUE.")
        (own if name in own else others)[name] = value
    return own, others


def own_settings(defaults: Mapping[str, str], arguments: Sequence[str]) -> dict[str, str]:
    """`name=value` arguments over their defaults, as text. UserError for a name that has none, or one without value."""
    own, others = own_and_others(defaults, arguments)
    for name in others:
        raise unknown("setting", name, tuple(own))
    return own
