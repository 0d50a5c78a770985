"""GPUs that read each other's memory, as threads: each does at once what it is given, and really waits for signals.

A thread that waits stands for a device whose queue has come to a halt; what never ends here would never end there.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

PATIENCE = 20.0


class Host:
    """The memory of all workers, by slot and generation, and the signals that lie in it."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.changed = threading.Condition()
        self.memories: dict[Any, dict[int, torch.Tensor]] = {}
        self.signals: set[Any] = set()

    def until(self, is_so: Callable[[], bool], what: Any) -> None:
        with self.changed:
            assert self.changed.wait_for(is_so, PATIENCE), what


class Handle:
    """What symmetric memory gives: the others' buffers and signals that go back to unset when they are seen."""

    def __init__(self, host: Host, key: Any, rank: int) -> None:
        self.host, self.key, self.rank = host, key, rank

    def get_buffer(self, peer: int, sizes: list[int], dtype: torch.dtype, offset: int) -> torch.Tensor:
        return self.host.memories[self.key][peer].view(dtype)[offset : offset + sizes[0]]

    def put_signal(self, peer: int, channel: int) -> None:
        signal = (self.key, self.rank, peer, channel)
        self.host.until(lambda: signal not in self.host.signals, ("put", signal))
        with self.host.changed:
            self.host.signals.add(signal)
            self.host.changed.notify_all()

    def wait_signal(self, peer: int, channel: int) -> None:
        signal = (self.key, peer, self.rank, channel)
        self.host.until(lambda: signal in self.host.signals, ("wait", signal))
        with self.host.changed:
            self.host.signals.remove(signal)
            self.host.changed.notify_all()


def install(monkeypatch: pytest.MonkeyPatch, host: Host) -> None:
    """Let apps.training.workers.peer_copies run on `host`."""
    from apps.training.workers import peer_copies

    def reserve(slot: Any, nbytes: int, group: Any) -> None:
        if slot.memory is not None and slot.memory.numel() >= nbytes:
            return
        rank = int(threading.current_thread().name)
        slots = threading.current_thread().__dict__.setdefault("slots", {})
        number = slots.setdefault(id(slot), len(slots))
        key = (number, nbytes)
        slot.memory = torch.full((nbytes,), 255, dtype=torch.uint8)
        with host.changed:
            host.memories.setdefault(key, {})[rank] = slot.memory
            host.changed.notify_all()
        host.until(lambda: len(host.memories[key]) == host.world_size, ("meet", key))
        slot.handle = Handle(host, key, rank)

    idle = SimpleNamespace(record=lambda: None, wait=lambda: None, wait_stream=lambda other: None)
    cuda = {
        "Stream": lambda priority: idle,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: idle,
        "Event": lambda: idle,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(peer_copies._Slot, "reserve", reserve)


def run_workers(world_size: int, work: Callable[[int], None]) -> None:
    """`work(rank)` in a thread for each rank; its failure is raised here."""
    failed: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            work(rank)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=body, args=(rank,), name=str(rank)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
