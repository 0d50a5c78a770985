"""Settings of a benchmark that takes none of train_llm.py's."""

from collections.abc import Mapping, Sequence

from backends.errors import UserError, unknown


def own_settings(defaults: Mapping[str, str], arguments: Sequence[str]) -> dict[str, str]:
    """`name=value` arguments over their defaults, as text. UserError for a name that has none, or one without value."""
    own = dict(defaults)
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name not in own:
            raise unknown("setting", name, tuple(own))
        if not equals:
            raise UserError(f"Setting {name} has no value. Expected {name}=VALUE.")
        own[name] = value
    return own
