"""How far a pass over the calibration data is: what a person is shown, and those hear who wait for this worker."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")

Tell = Callable[[int, int], None]  # done, of how many
OnPass = Callable[[str, str, int, int], None]  # what is done, of what, done, of how many


def counted(items: Collection[T], tell: Tell) -> Iterator[T]:
    """The items in turn; `tell` is called before the first, and when the work on each is done."""
    tell(0, len(items))
    for number, item in enumerate(items, start=1):
        yield item
        tell(number, len(items))
