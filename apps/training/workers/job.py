"""What is known of each worker, and the verdict on the job: has one failed, is one lost, does one stand still?

Pure bookkeeping without sockets or clocks of its own. Time is the job's time: it stands still while no worker shows a
sign of life, so a job that was suspended as a whole (Ctrl-Z, a closed lid) is not taken for one that hangs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SILENT = 3.0  # seconds without a sign of life, six of them, after which a worker counts as unresponsive
SECOND_THOUGHT = 0.3  # seconds: a death is seen by the others as a broken connection, whose report may come in first
AGREEMENT = 2.0  # seconds in which all workers find the same mistake of the user


@dataclass(frozen=True)
class Verdict:
    """`text` is said once, for the whole job; everybody ends with `code`."""

    text: str
    code: int


@dataclass
class Worker:
    rank: int
    host: str
    machine: str  # names kernel and process namespace: where `pid` means this process
    pid: int
    heard: float
    moved: float
    progress: int = 0
    what: str = "starting"
    waiting: bool = False
    failure: dict[str, Any] | None = None
    gone: bool = False
    left: bool = False


class Job:
    """`hear` and `lose` as things happen, `advance` as time goes by, then `verdict`."""

    def __init__(self, world_size: int, *, timeout: float, setting: str, machine: str = "") -> None:
        """`timeout` is in seconds, `setting` what a user gives it by."""
        self.world_size, self.timeout, self.setting, self.machine = world_size, timeout, setting, machine
        self.workers: dict[int, Worker] = {}
        self.clock = 0.0
        self.quiet = 0.0
        self.troubles: list[tuple[float, Worker]] = []  # in the order they became known

    @property
    def is_over(self) -> bool:
        """Everybody has said farewell."""
        return len(self.workers) == self.world_size and all(worker.left for worker in self.workers.values())

    @property
    def first_is_gone(self) -> bool:
        return self.workers[0].gone

    def advance(self, seconds: float) -> None:
        self.quiet += seconds
        if self.quiet < SILENT or self.troubles or not self.workers:
            self.clock += min(seconds, 1.0)

    def hear(self, rank: int, line: dict[str, Any]) -> None:
        """A greeting {rank, host, machine, pid}, a beat {progress, what, waiting}, a failure or a farewell {left}."""
        self.quiet = 0.0
        if rank not in self.workers:
            self.workers[rank] = Worker(rank, line["host"], line["machine"], line["pid"], self.clock, self.clock)
            return
        worker = self.workers[rank]
        worker.heard = self.clock
        if "progress" in line:
            if line["progress"] != worker.progress:
                worker.progress, worker.moved = line["progress"], self.clock
            worker.what, worker.waiting = line["what"], line["waiting"]
        if "failure" in line and worker.failure is None:
            worker.failure = line["failure"]
            self.troubles.append((self.clock, worker))
        if "left" in line:
            worker.left = worker.waiting = True

    def lose(self, rank: int) -> None:
        """The worker's connection has ended."""
        worker = self.workers[rank]
        worker.gone = True
        if not worker.left and worker.failure is None:
            self.troubles.append((self.clock, worker))

    def unresponsive(self) -> list[tuple[str, int]]:
        """Machine and process of workers that would not hear that they have to end."""
        return [(one.machine, one.pid) for one in self.workers.values() if not one.gone and self._is_silent(one)]

    def verdict(self) -> Verdict | None:
        """None while all is well, or while a better reason may still come in."""
        return self._trouble() if self.troubles else self._stall()

    # ------------------------------------------------------------------------------------------------------------------

    def _trouble(self) -> Verdict | None:
        since = self.clock - self.troubles[0][0]
        lost = [worker for _, worker in self.troubles if worker.failure is None]
        if lost:
            one = lost[0]
            return Verdict(
                f"error: {self._name(one, process=True)} is gone without a word, as when it is killed or out of "
                f"memory; last heard of at: {one.what}.",
                1,
            )
        if len(self.workers) < self.world_size and since < AGREEMENT:
            return None  # those who are still on their way shall hear it
        said = [worker.failure for _, worker in self.troubles if worker.failure["said"]]  # type: ignore[index]
        if said:
            return Verdict("", said[0]["code"])  # type: ignore[index]
        mistakes = {worker.rank: worker.failure for _, worker in self.troubles if worker.failure["code"] == 2}  # type: ignore[index]
        if len(mistakes) == len(self.troubles):
            if 0 in mistakes:
                return Verdict(f"error: {mistakes[0]['line']}", 2)  # type: ignore[index]
            if since < AGREEMENT:
                return None
        elif since < SECOND_THOUGHT:
            return None
        first = self.troubles[0][1]
        failure = first.failure or {}
        if failure["code"] == 130:
            return Verdict("interrupted", 130)
        told = f"error: {self._name(first)}: {failure['line']}"
        return Verdict(f"{failure['trace'].rstrip()}\n{told}" if failure["trace"] else told, failure["code"])

    def _stall(self) -> Verdict | None:
        if len(self.workers) < self.world_size:
            missing = [str(rank) for rank in range(self.world_size) if rank not in self.workers]
            if self.clock < self.timeout:
                return None
            some = ", ".join(missing[:8]) + (" …" if len(missing) > 8 else "")
            return Verdict(
                f"error: {len(missing)} of {self.world_size} workers have not come up within {self.timeout:g} s: "
                f"worker {some}. Look at their hosts, or raise {self.setting}.",
                1,
            )
        at_work = [worker for worker in self.workers.values() if not worker.left]
        still = [worker for worker in at_work if self.clock - worker.moved > self.timeout]
        silent = [worker for worker in still if self._is_silent(worker)]
        busy = [worker for worker in still if not worker.waiting]
        if silent or busy:
            one = (silent or busy)[0]
            kind = "shown no sign of life" if silent else "made no progress"
            return Verdict(
                f"error: {self._name(one, process=True)} has {kind} for {self.timeout:g} s: {one.what}. "
                f"Raise {self.setting} if it needs longer.",
                1,
            )
        if still and len(still) == len(at_work):
            at = "; ".join(f"worker {worker.rank}: {worker.what}" for worker in still[:8])
            return Verdict(
                f"error: All workers of {self.world_size} wait for one another since {self.timeout:g} s: {at}.", 1
            )
        return None

    def _is_silent(self, worker: Worker) -> bool:
        return self.clock - worker.heard > min(SILENT, self.timeout)

    def _name(self, worker: Worker, *, process: bool = False) -> str:
        where = f"{worker.host}, process {worker.pid}" if process else worker.host
        return f"Worker {worker.rank} of {self.world_size} ({where})"
