"""Lower many regions side by side: on CPU in forked processes, on CUDA in those of `spawned`, if there are any."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from backends.errors import UserError
from compiled import lowering
from compiled.capture import Captured
from compiled.regions import RegionSpec
from compiled.spawned import Outcome, SpawnedWorkers, compile_threads, end_at_once, end_with_parent

# Called when a region is done: its spec, how many are done, of how many.
Report = Callable[[RegionSpec, int, int], None]


@dataclass(frozen=True)
class _Work:
    regions: dict[str, Captured]
    device_type: str
    folder: Path
    debug: Path | None

    def lower(self, name: str) -> Outcome:
        started = time.perf_counter()
        region = self.regions[name]
        debug = self.debug / name if self.debug else None
        kernels = lowering.lower(region.graph, region.inputs, self.device_type, self.folder / name, debug)
        return kernels, round(time.perf_counter() - started, 2)


# A forked worker inherits the graphs here and is told a name.
_work: _Work | None = None


def lower_all(
    regions: dict[str, Captured],
    device_type: str,
    folder: Path,
    workers: int | None,
    debug: Path | None,
    report: Report,
    spawned: SpawnedWorkers | None = None,
) -> None:
    """Lower every region into `folder/NAME`; fills in each spec's `kernels` and `seconds`.

    `spawned` has begun with each of them already. A process that has touched the device must not fork: without, CUDA
    regions are lowered one after another.
    """
    global _work
    _work = work = _Work(regions, device_type, folder, debug)
    jobs = min(workers or compile_threads(), len(regions))
    try:
        if spawned is not None:
            jobs = spawned.count
            for done, (name, outcome) in enumerate(spawned.results(folder), 1):
                _finish(regions[name].spec, outcome or work.lower(name), report, done, len(regions))
        elif device_type == "cpu" and jobs > 1:
            lowering.prepare_forks()
            context = multiprocessing.get_context("fork")
            with end_at_once(ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin_work)) as pool:
                longest_first = sorted(regions, key=lambda name: -regions[name].spec.nodes)
                futures = {pool.submit(_lower, name): name for name in longest_first}
                for done, future in enumerate(as_completed(futures), 1):
                    _finish(regions[futures[future]].spec, future.result(), report, done, len(regions))
        else:
            for done, name in enumerate(regions, 1):
                _finish(regions[name].spec, work.lower(name), report, done, len(regions))
    except BrokenProcessPool:
        raise UserError(
            f"A compile worker was killed, most likely for memory: {jobs} worked at a time. Use compile.workers=1."
        ) from None
    finally:
        _work = None


def _lower(name: str) -> Outcome:
    assert _work is not None
    return _work.lower(name)


def _begin_work() -> None:
    # a forked child must not enter an OpenMP region, whose threads stayed with the parent
    torch.set_num_threads(1)
    assert _work is not None
    os.environ["TMPDIR"] = str(_work.folder)  # of the C++ compiler: what it leaves when it is stopped goes away too
    os.setpgid(0, 0)  # a group for it and its compiler, which Ctrl-C in a terminal passes by: the parent ends it
    threading.Thread(target=end_with_parent, daemon=True).start()


def _finish(spec: RegionSpec, outcome: Outcome, report: Report, done: int, total: int) -> None:
    spec.kernels, spec.seconds = outcome
    report(spec, done, total)
