"""The one error a user may see as a single line: what was given, what was expected, what to type next."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave. Its message is one line (but for tables); apps print it and exit with code 2."""


def did_you_mean(given: str, available: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of `available`, or "" when none is near."""
    names = {name.lower(): name for name in available}
    close = difflib.get_close_matches(str(given).lower(), names, n=1, cutoff=0.6)
    return f" Did you mean '{names[close[0]]}'?" if close else ""


def unknown(kind: str, given: str, available: Iterable[str]) -> UserError:
    """Build the error for an unknown name of a `kind` ("backend", "option of dense", ...)."""
    names = tuple(available)
    listed = ", ".join(names) if names else "none"
    return UserError(f"Unknown {kind} '{given}'.{did_you_mean(given, names)} Available: {listed}.")
