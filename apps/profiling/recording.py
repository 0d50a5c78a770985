"""Record a few steps of a program with its regions labelled. In any other program nothing is labelled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from apps.profiling.names import COLLECTIVES, REGION, STEP
from apps.training.devices import wait
from apps.training.files import atomic_path
from compiled.program import CompiledProgram

WARM_UP = 3  # steps that load kernels and set up libraries


def record(step: Callable[[], object], steps: int, device: torch.device, trace: Path | None) -> float:
    """Take `steps` steps under the profiler and write their trace (None: another worker does), all or nothing.

    Returns the median seconds of as many steps without it.
    """
    for _ in range(WARM_UP):
        step()
    seconds = []
    for _ in range(steps):
        wait(device)
        began = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - began)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True):  # the first profile of a process sets the profiler up
        step()
        wait(device)
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):  # the host runs ahead of the device, as in training
            with record_function(STEP):
                step()
        wait(device)
    if trace is not None:
        with atomic_path(trace) as temporary:
            profiler.export_chrome_trace(str(temporary))
    return median(seconds)


def label(program: CompiledProgram) -> None:
    """Let each region, and what passes between workers, appear in traces by its name."""
    for name, region in program.binding.regions.items():
        region.run = _labelled(REGION + name, region.run)
    if not program.reducer.is_alone:
        program.reducer = program.updater.reducer = LabelledReducer(program.reducer)


def _labelled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def labelled(*arguments: Any, **options: Any) -> Any:
        with record_function(name):
            return function(*arguments, **options)

    return labelled


class LabelledReducer:
    """A reducer whose communication is labelled; everything else is its own."""

    def __init__(self, reducer: Any) -> None:
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._reducer, name)
        communicates = name in ("expect_rows", "start", "sum_", "max_", "publish", "settle")
        return _labelled(COLLECTIVES, found) if communicates else found

    def finished(self, **options: Any) -> Iterator[Any]:
        """Labelled while it is asked for the next group; what is done with a group is not the reducer's."""
        groups = self._reducer.finished(**options)
        while True:
            with record_function(COLLECTIVES):
                group = next(groups, None)
            if group is None:
                return
            yield group
