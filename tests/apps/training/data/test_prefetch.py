"""The background thread: same items, errors handed over, and gone when nobody listens."""

import gc
import threading
import time
from itertools import count

import pytest

from apps.training.data.prefetch import prefetched


def living():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    assert living() == []


def test_same_items_in_order():
    assert list(prefetched(range(100), depth=3)) == list(range(100))
    assert list(prefetched([])) == []


def test_items_are_made_ahead_but_only_so_many():
    made = []
    items = prefetched((made.append(i) or i for i in count()), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(made) == 4  # one taken, two waiting, one in hand
    items.close()


def test_an_error_reaches_the_consumer_after_the_items_before_it():
    def broken():
        yield 1
        raise OSError("disk on fire")

    items = prefetched(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="disk on fire"):
        next(items)


def test_the_thread_ends_when_the_consumer_is_interrupted():
    def consume():
        for item in prefetched(count()):
            if item == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()


def test_the_thread_ends_when_the_iterator_is_forgotten():
    items = prefetched(count())
    next(items)
    assert len(living()) == 1
    del items
    gc.collect()
    assert living() == []
