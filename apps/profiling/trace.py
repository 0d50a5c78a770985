"""Read a trace of torch.profiler: how long each labelled part of the steps took, and in which kernels.

On a GPU a part's time is that of its kernels: each is traced back to the call that launched it, by the correlation id
both have, and from there to the innermost label around that call. Where kernels of two parts run at once (sums of
gradients beside regions), the time belongs to the region. On a CPU a part's time is that of its label.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.profiling.names import BETWEEN, COLLECTIVES, REGION, STEP

_OF_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}


@dataclass(frozen=True)
class Span:
    """From `begin` to `end`, microseconds; `part`: whose time it is."""

    name: str
    begin: float
    end: float
    part: str = ""


@dataclass
class Part:
    """One part of the recorded steps: a region, the collectives, what lies between. All of them together in one step.

    seconds: its share of a step's time, those of all parts and the idle time add up to the step's. busy: with what runs
    beside other parts. calls: a step's. kernels: seconds by name, the largest first.
    """

    name: str
    calls: float = 0.0
    seconds: float = 0.0
    busy: float = 0.0
    kernels: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """The mean step of a trace, seconds. `idle`: no kernel runs, on a CPU nothing but the host's own work."""

    seconds: float
    idle: float
    parts: list[Part]
    on_gpu: bool


def read_trace(path: Path) -> Profile:
    """The parts of the steps recorded in a trace file."""
    content = path.read_bytes()
    return read_events(json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)["traceEvents"])


def read_events(events: Iterable[dict[str, Any]]) -> Profile:
    """The same, of the trace's events."""
    by_category: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            by_category[event.get("cat", "")].append(event)
    labels = [_span(event) for event in by_category["user_annotation"]]
    steps = [each for each in labels if each.name == STEP]
    labels = [each for each in labels if each.name == COLLECTIVES or each.name.startswith(REGION)]
    kernels = [event for category in _OF_DEVICE for event in by_category[category]]
    if kernels:
        launches = {
            event["args"]["correlation"]: float(event["ts"])
            for category in _LAUNCHES
            for event in by_category[category]
            if "correlation" in event.get("args", {})
        }
        spans = _of_kernels(kernels, launches, _Enclosing(labels), _Enclosing(steps))
        begin, end = min(each.begin for each in spans), max(each.end for each in spans)
        inside = spans
    else:
        spans = [Span(each.name, each.begin, each.end, each.name) for each in labels]
        begin, end = min(each.begin for each in steps), max(each.end for each in steps)
        inside = _outermost(map(_span, by_category["cpu_op"]), _Enclosing(labels))
    return _profile(spans, inside, labels, begin, end, len(steps), on_gpu=bool(kernels))


def _profile(
    spans: Sequence[Span],
    inside: Iterable[Span],
    labels: Iterable[Span],
    begin: float,
    end: float,
    steps: int,
    *,
    on_gpu: bool,
) -> Profile:
    """`spans`: what time is spent in; `inside`: what to name in each part."""
    second = 1e6 * steps  # from microseconds of all steps to seconds of one
    calls = Counter(each.name for each in labels)
    shares, idle = shares_of_time(spans, begin, end)
    parts: dict[str, Part] = {}
    for span in sorted(spans, key=lambda each: each.begin):
        part = parts.setdefault(span.part, Part(span.part.removeprefix(REGION), calls[span.part] / steps))
        part.seconds = shares[span.part] / second
        part.busy += (span.end - span.begin) / second
    for span in inside:
        kernels = parts[span.part].kernels
        kernels[span.name] = kernels.get(span.name, 0.0) + (span.end - span.begin) / second
    for part in parts.values():
        part.kernels = dict(sorted(part.kernels.items(), key=lambda item: -item[1]))
    return Profile((end - begin) / second, idle / second, list(parts.values()), on_gpu)


def shares_of_time(spans: Iterable[Span], begin: float, end: float) -> tuple[dict[str, float], float]:
    """How much of the time from `begin` to `end` each part has for itself, and for how much of it nothing runs.

    Of several at once a region has the time before what lies between regions, and that before collectives; of equals
    the one that began first.
    """
    spans = list(spans)
    marks = sorted(
        [(each.begin, 1, index) for index, each in enumerate(spans)]
        + [(each.end, 0, index) for index, each in enumerate(spans)]
    )
    shares: dict[str, float] = defaultdict(float)
    running: set[int] = set()
    idle, last = 0.0, begin
    for at, begins, index in marks:
        if running:
            shares[spans[min(running, key=lambda one: (_rank(spans[one].part), spans[one].begin))].part] += at - last
        else:
            idle += at - last
        last = at
        (running.add if begins else running.discard)(index)
    return shares, idle + end - last


def _rank(part: str) -> int:
    return {COLLECTIVES: 2, BETWEEN: 1}.get(part, 0)


class _Enclosing:
    """Finds the span around a moment, of spans that do not overlap: one thread makes them, and they do not nest."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self._spans = sorted(spans, key=lambda each: each.begin)
        self._begins = [each.begin for each in self._spans]

    def around(self, moment: float) -> Span | None:
        before = bisect_right(self._begins, moment)
        return self._spans[before - 1] if before and self._spans[before - 1].end >= moment else None


def _of_kernels(
    kernels: Iterable[dict[str, Any]], launches: dict[Any, float], labels: _Enclosing, steps: _Enclosing
) -> list[Span]:
    """The kernels that the steps launched, with the parts they belong to."""
    spans = []
    for event in kernels:
        launched = launches.get(event.get("args", {}).get("correlation"))
        if launched is None or steps.around(launched) is None:
            continue
        label = labels.around(launched)
        kernel = _span(event)
        spans.append(Span(kernel.name, kernel.begin, kernel.end, BETWEEN if label is None else label.name))
    return spans


def _outermost(operators: Iterable[Span], labels: _Enclosing) -> list[Span]:
    """Operators inside labels that no other operator called."""
    found: list[Span] = []
    end = 0.0
    for each in sorted(operators, key=lambda each: (each.begin, -each.end)):
        if each.begin < end:
            continue
        end = each.end
        label = labels.around(each.begin)
        if label is not None:
            found.append(Span(each.name, each.begin, each.end, label.name))
    return found


def _span(event: dict[str, Any]) -> Span:
    begin = float(event["ts"])
    return Span(event["name"], begin, begin + float(event.get("dur", 0.0)))
