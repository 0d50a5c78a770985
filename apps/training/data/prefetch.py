"""Work ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _Ended:
    """The last thing in the queue: the iterable ended, with this error if any."""

    error: BaseException | None


def prefetched(items: Iterable[T], depth: int = 4) -> Iterator[T]:
    """Yield `items`, made up to `depth` ahead by a thread.

    An error while making an item is raised here, after the items before it. The thread ends when the items do, or when
    this iterator is closed, collected or left by an exception such as Ctrl-C.
    """
    ready: queue.Queue[T | _Ended] = queue.Queue(depth)
    stop = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, stop), name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Ended):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        while not ready.empty():  # the thread may wait for room
            ready.get_nowait()
        thread.join()


def _fill(items: Iterable[T], ready: queue.Queue[T | _Ended], stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not _put(ready, item, stop):
                return
    except BaseException as caught:  # handed to the consumer, whatever it is
        error = caught
    _put(ready, _Ended(error), stop)


def _put(ready: queue.Queue[T | _Ended], item: T | _Ended, stop: threading.Event) -> bool:
    """Put when there is room; False when asked to stop instead."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False
