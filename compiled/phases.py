"""Where the time of a step goes: marks on the host's clock, or on a GPU events among the device's work."""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Mark:
    phase: str
    at: "float | torch.cuda.Event"


class Phases:
    """Seconds of each phase of the last step that was marked. A recorded step's events are part of its recording."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Mark] = []

    def start(self) -> None:
        """A step begins."""
        self.marks = []

    def enter(self, phase: str) -> None:
        """From here on the time belongs to `phase`, until the next one is entered."""
        self.marks.append(Mark(phase, self._now()))

    def finish(self) -> None:
        """The step ends."""
        self.enter("")

    def seconds(self) -> dict[str, float]:
        """By phase, in the order in which they were first entered. On a GPU it waits until the step is done."""
        result: dict[str, float] = {}
        for mark, following in zip(self.marks, self.marks[1:], strict=False):
            result[mark.phase] = result.get(mark.phase, 0.0) + _between(mark.at, following.at)
        return result

    def _now(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event


def _between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert not isinstance(begin, float)
    assert not isinstance(end, float)
    end.synchronize()
    return begin.elapsed_time(end) / 1000
