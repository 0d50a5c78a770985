"""Native code that may crash, loop or take all memory: each task in a forked process with limits of its own.

MLIR's tools answer a mistake by lines on file descriptor 2, an exception that says little, or a signal.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import torch

Task = Callable[[], Any]


@dataclass(frozen=True)
class Limits:
    """Of one task: seconds, and GiB of address space beyond what the process has when it starts."""

    timeout_s: float = 600.0
    memory_gb: float = 16.0


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its value, or why there is none (`problem`, one line) with what it wrote to fd 2."""

    value: Any = None
    problem: str | None = None
    output: str = ""
    seconds: float = 0.0

    @property
    def error_lines(self) -> list[str]:
        """What MLIR reported, without the location in front."""
        lines = [line.partition("error: ")[2].strip() for line in self.output.splitlines() if "error: " in line]
        return [line for line in lines if line]


class _Running:
    def __init__(self, task: Task, limits: Limits) -> None:
        self.limits, self.started = limits, time.monotonic()
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  closed by finish()
        self.folder = tempfile.TemporaryDirectory(prefix="substrate-mlir-")  # for whatever the task leaves behind
        self.receiver, sender = multiprocessing.Pipe(duplex=False)
        context = multiprocessing.get_context("fork")
        self.process = context.Process(
            target=_work, args=(task, limits, self.log.fileno(), self.folder.name, sender), daemon=False
        )
        sys.stdout.flush()
        self.process.start()
        sender.close()

    @property
    def left(self) -> float:
        return self.started + self.limits.timeout_s - time.monotonic()

    def finish(self) -> Outcome:
        """Called when there is something to receive, the process has ended, or its time is over."""
        answer: tuple[Any, str | None] | None = None
        with contextlib.suppress(EOFError, OSError):
            if self.receiver.poll():
                answer = self.receiver.recv()
        seconds = round(time.monotonic() - self.started, 2)
        late = answer is None and self.left <= 0
        self.end()
        self.log.seek(0)
        output = self.log.read().decode(errors="replace")
        self.log.close()
        if answer is not None:
            return Outcome(*answer, output, seconds)
        return Outcome(None, self._end_text(late, output), output, seconds)

    def end(self) -> None:
        if self.process.exitcode is None and self.left > 0 and not self.receiver.closed:
            self.process.join(1)
        if self.process.exitcode is None:
            kill_group(self.process)
        self.process.join()
        self.receiver.close()
        self.folder.cleanup()

    def _end_text(self, late: bool, output: str) -> str:
        code = self.process.exitcode or 0
        if late:
            return f"took longer than {self.limits.timeout_s:g} s"
        if "bad_alloc" in output or "out of memory" in output.lower():
            return f"needed more than {self.limits.memory_gb:g} GiB of memory"
        return f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def run_isolated(
    tasks: Mapping[str, Task],
    limits: Limits,
    at_a_time: int = 1,
    report: Callable[[str, Outcome], None] = lambda name, outcome: None,
) -> dict[str, Outcome]:
    """Run every task in a process of its own; what it returns is pickled. `report` is called as each one ends."""
    waiting, running, done = list(tasks), dict[str, _Running](), dict[str, Outcome]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                name = waiting.pop(0)
                running[name] = _Running(tasks[name], limits)
            soonest = max(0.0, min(each.left for each in running.values()))
            wait([each.receiver for each in running.values()], soonest)
            for name, each in list(running.items()):
                if each.receiver.poll() or each.process.exitcode is not None or each.left <= 0:
                    done[name] = running.pop(name).finish()
                    report(name, done[name])
    finally:
        for each in running.values():  # an error or Ctrl-C: what is left is of no use to anybody
            kill_group(each.process)
            each.end()
    return {name: done[name] for name in tasks}


def kill_group(process: Any) -> None:
    """End a worker with the programs that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # should it not have its group yet


def _work(task: Task, limits: Limits, log: int, folder: str, sender: Connection) -> NoReturn:
    os.setpgid(0, 0)  # a group of its own, which Ctrl-C in a terminal passes by: the parent ends it
    faulthandler.disable()  # a crash is reported in one line, by the parent
    os.dup2(log, 2)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    torch.set_num_threads(1)  # a forked child must not enter an OpenMP region, whose threads stayed with the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit_memory(limits.memory_gb)
    answer: tuple[Any, str | None]
    try:
        answer = (task(), None)
    except MemoryError:
        answer = (None, f"needed more than {limits.memory_gb:g} GiB of memory")
    except BaseException as error:  # whatever it is, the parent is told
        answer = (None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no reason'}")
    sender.send(answer)
    sender.close()
    os._exit(0)  # what the parent registered to be done at exit is the parent's


def _limit_memory(gigabytes: float) -> None:
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = now + int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)
