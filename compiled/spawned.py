"""Processes that lower CUDA regions side by side.

A process that has touched the device must not fork, so that these start from nothing, while the caller imports, plans
and traces: the compiler's imports take them seconds. Graphs reach them in PyTorch's own pickle of graphs. Each compiles
its kernels itself; one at a time tries them on the device, where a neighbour would spoil the times.
"""

import contextlib
import importlib
import inspect
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from compiled import lowering

if TYPE_CHECKING:
    from compiled.capture import Captured

Outcome = tuple[int, float]  # of lowering a region: number of kernels, seconds

MOST = 8  # each holds a CUDA context, half a GiB of the device's memory and one of the host's
_device_turns: Any = None  # in a worker: held while it uses the device


def compile_threads() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


class SpawnedWorkers:
    """So many processes, already starting; a context manager that ends them at once."""

    def __init__(self, count: int, device_type: str) -> None:
        self.count, self._device_type = count, device_type
        self._begun: dict[str, Future[Outcome]] = {}
        context = multiprocessing.get_context("spawn")
        with contextlib.ExitStack() as ends:
            self._folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="substrate-compile-")))
            pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(context.Lock(),))
            self._pool = ends.enter_context(end_at_once(pool))
            for _ in range(count):  # the pool starts its processes when it has work
                self._pool.submit(_warm_up, device_type, max(1, compile_threads() // count))
            self._ends = ends.pop_all()

    def __enter__(self) -> "SpawnedWorkers":
        return self

    def __exit__(self, *error: Any) -> None:
        self._ends.__exit__(*error)

    def begin(self, region: "Captured", debug: Path | None = None) -> None:
        """Have a region lowered as soon as a process is free, with the determinism that is asked for now.

        `debug`: as for `lowering.lower`, in which the region has a folder of its name.
        """
        name = region.spec.name
        try:
            content = pickled(region)
        except Unreadable as reason:
            self._begun[name] = Future()
            self._begun[name].set_exception(reason)
            return
        self._begun[name] = self._pool.submit(
            _lower,
            content,
            modules_of_operators(region.graph),
            self._device_type,
            self._folder / name,
            None if debug is None else debug / name,
            torch.are_deterministic_algorithms_enabled(),
        )

    def results(self, folder: Path) -> "Iterator[tuple[str, Outcome | None]]":
        """Each region that was begun when it is done, with its machine code in `folder`; None: it has to be lowered
        where its graph is, since another process cannot read it."""
        names = {future: name for name, future in self._begun.items()}
        for future in as_completed(names):
            try:
                outcome = future.result()
            except Unreadable:
                yield names[future], None
                continue
            shutil.move(self._folder / names[future], folder / names[future])
            yield names[future], outcome


class Unreadable(Exception):
    """A region's graph cannot be made again in another process."""


def pickled(region: "Captured") -> bytes:
    """Graph and fake inputs of a region for another process. Raises Unreadable for a graph that holds what only lives
    in this one."""
    from torch.fx._graph_pickler import GraphPickler, Options

    try:
        return GraphPickler.dumps((region.graph, region.inputs), Options(ops_filter=None))  # any operator among them
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def unpickled(content: bytes, modules: Sequence[str]) -> tuple[GraphModule, list[Tensor]]:
    """Graph and fake inputs from `pickled`, with the operators that `modules` define. Raises Unreadable."""
    from torch.fx._graph_pickler import GraphPickler

    try:
        for module in map(importlib.import_module, modules):
            getattr(module, "register", lambda: None)()  # those of the house define their operators on demand
        return GraphPickler.loads(content, lowering.fake_mode())  # type: ignore[return-value]
    except Exception as error:
        raise Unreadable(f"{type(error).__name__}: {error}") from None


def modules_of_operators(graph: GraphModule) -> list[str]:
    """The modules that define the custom operators of a graph; torch's own are everywhere."""
    from torch._library.custom_ops import OPDEFS

    targets = {node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    functions = [OPDEFS[name]._init_fn for name in (target._schema.name for target in targets) if name in OPDEFS]
    modules = {_of_triton_operator(function).__module__ for function in functions}
    return sorted(module for module in modules if not module.startswith("torch."))


def _of_triton_operator(function: Any) -> Any:
    """What `triton_op` was given, which it hands on within a function of its own; other functions as they are."""
    if function.__module__ != "torch._library.triton":
        return function
    return inspect.getclosurevars(function).nonlocals["fn"]


def _lower(
    content: bytes, modules: Sequence[str], device_type: str, path: Path, debug: Path | None, deterministic: bool
) -> Outcome:
    started = time.perf_counter()
    graph, inputs = unpickled(content, modules)
    with lowering.determinism(deterministic):
        kernels = lowering.lower(graph, inputs, device_type, path, debug, device_turns=_device_turns)
    return kernels, round(time.perf_counter() - started, 2)


def _begin(device_turns: Any) -> None:
    global _device_turns
    _device_turns = device_turns
    torch.set_num_threads(1)
    # a named semaphore, which tqdm's lock would be in a spawned process, outlives one that is killed
    multiprocessing.set_start_method("fork", force=True)
    os.setpgid(0, 0)  # Ctrl-C in a terminal passes by: the parent ends it
    threading.Thread(target=end_with_parent, daemon=True).start()


def _warm_up(device_type: str, threads: int) -> None:
    lowering.prepare_spawned(device_type, threads, _device_turns)


@contextlib.contextmanager
def end_at_once(pool: ProcessPoolExecutor) -> Iterator[ProcessPoolExecutor]:
    """The pool, whose processes are killed behind the block: what is left to do is then of no use to anybody.

    By itself it would first finish what it has begun and more, half a minute after a Ctrl-C; and a process that holds a
    compiler and a device takes seconds to say goodbye.
    """
    others = set(multiprocessing.active_children())
    with pool:
        try:
            yield pool
        finally:
            for worker in set(multiprocessing.active_children()) - others:
                assert worker.pid is not None  # it was started
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(worker.pid, signal.SIGKILL)  # its compiler too
                worker.kill()  # should it not have its group yet


def end_with_parent() -> None:
    """A pool's worker waits for work for ever when its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
