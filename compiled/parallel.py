"""Lower many regions: on CPU in a forked process for each core, on CUDA one after another.

The CUDA compiler runs a pool of its own, and a process that has touched the device must not fork.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch

from backends.errors import UserError
from compiled import lowering
from compiled.capture import Captured
from compiled.regions import RegionSpec

# Called when a region is done: its spec, how many are done, of how many.
Report = Callable[[RegionSpec, int, int], None]


@dataclass(frozen=True)
class _Work:
    regions: dict[str, Captured]
    device_type: str
    folder: Path
    debug: Path | None

    def lower(self, name: str) -> tuple[int, float]:
        started = time.perf_counter()
        region = self.regions[name]
        debug = self.debug / name if self.debug else None
        kernels = lowering.lower(region.graph, region.inputs, self.device_type, self.folder / name, debug)
        return kernels, round(time.perf_counter() - started, 2)


# Traced graphs cannot be pickled: a forked worker inherits them here and is told a name.
_work: _Work | None = None


def lower_all(
    regions: dict[str, Captured],
    device_type: str,
    folder: Path,
    workers: int | None,
    debug: Path | None,
    report: Report,
) -> None:
    """Lower every region into `folder/NAME`; fills in each spec's `kernels` and `seconds`."""
    global _work
    _work = _Work(regions, device_type, folder, debug)
    jobs = min(workers or lowering.compile_threads(), len(regions))
    try:
        if device_type != "cpu" or jobs == 1:
            for done, name in enumerate(regions, 1):
                _finish(regions[name].spec, _work.lower(name), report, done, len(regions))
            return
        lowering.prepare_forks()
        with _workers(jobs) as pool:
            longest_first = sorted(regions, key=lambda name: -regions[name].spec.nodes)
            futures = {pool.submit(_lower, name): name for name in longest_first}
            for done, future in enumerate(as_completed(futures), 1):
                _finish(regions[futures[future]].spec, future.result(), report, done, len(regions))
    except BrokenProcessPool:
        raise UserError(
            f"A compile worker was killed, most likely for memory: {jobs} worked at a time. Use compile.workers=1."
        ) from None
    finally:
        _work = None


def _lower(name: str) -> tuple[int, float]:
    assert _work is not None
    return _work.lower(name)


@contextlib.contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Forked workers that end with the block, at once when it raises: what is left to do is then of no use to anybody.

    The pool alone would first finish what it has begun and more, half a minute after a Ctrl-C.
    """
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork"), initializer=_begin_work) as pool:
        try:
            yield pool
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                assert worker.pid is not None  # it was started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)  # its compiler too
                worker.kill()  # should it not have its group yet
            raise


def _begin_work() -> None:
    # a forked child must not enter an OpenMP region, whose threads stayed with the parent
    torch.set_num_threads(1)
    assert _work is not None
    os.environ["TMPDIR"] = str(_work.folder)  # of the C++ compiler: what it leaves when it is stopped goes away too
    os.setpgid(0, 0)  # a group for it and its compiler, which Ctrl-C in a terminal passes by: the parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's worker waits for work for ever when its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _finish(spec: RegionSpec, outcome: tuple[int, float], report: Report, done: int, total: int) -> None:
    spec.kernels, spec.seconds = outcome
    report(spec, done, total)
