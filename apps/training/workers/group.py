"""The workers of a run as the rest of the run sees them: sums, one voice, one end. One worker is the simple case."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from apps.training.cli import INTERRUPTED, user_line
from apps.training.workers.launch import Launch
from apps.training.workers.lifeline import Lifeline, end_now
from apps.training.workers.mpi import OfEveryWorker
from apps.training.workers.rendezvous import join
from apps.training.workers.watch import BEAT

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

TO_MEET = 60.0  # seconds
UNTIL_THE_FIRST_SPOKE = 3.0


class Workers:
    """All workers of the run, seen from one of them. Every method works for one worker too, without any communication.

    `device_group` sums tensors of the device (NCCL or gloo; None for one worker). Every worker calls the methods that
    communicate, in the same order.
    """

    def __init__(
        self,
        launch: Launch,
        lifeline: Lifeline | None = None,
        device_group: ProcessGroup | None = None,
        host_group: ProcessGroup | None = None,
    ) -> None:
        self.rank, self.world_size = launch.rank, launch.world_size
        self.local_rank, self.local_world_size = launch.local_rank, launch.local_world_size
        self.is_first = launch.is_first
        self.device_group, self.host_group = device_group, host_group
        self.lifeline = lifeline

    @classmethod
    def solo(cls) -> Workers:
        """One worker: no launcher, no group, no watch."""
        return cls(Launch())

    def sum_counts(self, *numbers: int) -> tuple[int, ...]:
        """Each number's sum over all workers, exact (int64), on the host: no device is waited for."""
        if self.host_group is None:
            return numbers
        import torch
        import torch.distributed as dist

        counts = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(counts, group=self.host_group)
        return tuple(counts.tolist())

    def sum_(self, tensor: Tensor) -> Tensor:
        """`tensor` (on the device) becomes its sum over all workers, in place."""
        if self.device_group is not None:
            import torch.distributed as dist

            dist.all_reduce(tensor, group=self.device_group)
        return tensor

    def broadcast_text(self, text: str) -> str:
        """Worker 0's `text`."""
        if self.host_group is None:
            return text
        import torch.distributed as dist

        box = [text]
        dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def barrier(self) -> None:
        """Go on when every worker has come here."""
        self.sum_counts(0)

    def doing(self, what: str) -> None:
        """What this worker does from now on ("reading rows of step 17"): named when it gets stuck there."""
        if self.lifeline is not None:
            self.lifeline.at(what, waiting=False)

    def waiting(self, what: str) -> None:
        """What this worker waits for others with from now on: it is not to blame when they do not come."""
        if self.lifeline is not None:
            self.lifeline.at(what, waiting=True)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """The block takes as long as it takes (saving a model): the watch is told again and again that it goes on."""
        over = threading.Event()

        def tell() -> None:
            self.doing(what)
            while not over.wait(BEAT):
                self.doing(what)

        telling = threading.Thread(target=tell, name="busy", daemon=True)
        telling.start()
        try:
            yield
        finally:
            over.set()
            telling.join()


@contextmanager
def open_workers(
    launch: Launch, *, device_type: str, timeout: float, setting: str = "training.worker_timeout"
) -> Iterator[Workers]:
    """The workers of a run; `device_type` is "cpu" or "cuda", `timeout` the seconds without progress that end the job,
    `setting` what a user gives them by.

    Whatever ends the block in one worker ends the job: an exception is reported, once, and every process exits (2 for a
    mistake of the user, 1 otherwise). A block that ends well waits for everybody's: saving by worker 0 included.
    """
    if launch.world_size == 1:
        yield Workers.solo()
        return
    lifeline = None
    previous = _on_terminate(signal.SIG_DFL, _interrupt)
    try:
        lifeline, store = join(launch, timeout=timeout, setting=setting)
        lifeline.at("meeting the other workers", waiting=True)
        if store is None:  # worker 0 has failed and will say why
            time.sleep(timeout)
            raise TimeoutError("worker 0 told no store")
        workers = Workers(launch, lifeline, *_open_groups(launch, store, device_type, timeout))
        workers.doing("starting")
        yield workers
        sys.stdout.flush()
        lifeline.leave()
    except BaseException as error:
        if lifeline is None:
            _end_alone(launch, error)
        lifeline.fail(*_told(error))
    finally:
        _on_terminate(_interrupt, previous)
    _close_groups()
    lifeline.linger()


def fail_before_opening(launch: Launch, error: BaseException) -> NoReturn:
    """End the job because of an error before `open_workers`: the workers meet only to find out who has what to say.

    Worker 0 need not ask: it says it, and gives the others a moment to come and hear that all is over.
    """
    told = _told(error)
    if not launch.is_first:
        try:
            lifeline, _ = join(launch, timeout=TO_MEET, with_store=False)
        except Exception:
            _end_alone(launch, error)
        lifeline.fail(*told)
    _say(launch, told)

    def tell_the_others() -> None:
        with suppress(Exception):
            lifeline, _ = join(launch, timeout=TO_MEET, with_store=False)
            lifeline.fail(*told, said=True)

    meeting = threading.Thread(target=tell_the_others, daemon=True)
    meeting.start()
    meeting.join(UNTIL_THE_FIRST_SPOKE)
    end_now(told.code)


class _Told(NamedTuple):
    """An error as it is told: one line, the traceback if it is a bug, the exit code."""

    line: str
    trace: str
    code: int


def _told(error: BaseException) -> _Told:
    mistake = user_line(error)
    if mistake is not None:
        return _Told(mistake, "", 2)
    if isinstance(error, KeyboardInterrupt):
        return _Told("interrupted", "", INTERRUPTED)
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[0]
    return _Told(line, "".join(traceback.format_exception(error)), 1)


def _say(launch: Launch, told: _Told) -> None:
    """On stderr, with the worker's name unless it is worker 0 with a mistake of the user: that is everybody's."""
    named = told.code == 1 or not launch.is_first
    me = f"Worker {launch.rank} of {launch.world_size} ({socket.gethostname()}): " if named else ""
    line = told.line if told.code == INTERRUPTED else f"error: {me}{told.line}"
    print(f"{told.trace}{line}", file=sys.__stderr__, flush=True)


def _end_alone(launch: Launch, error: BaseException) -> NoReturn:
    """Without a way to the others: worker 0 speaks first, and its end is the whole job's under most launchers."""
    told = _told(error)
    if launch.is_first:
        _say(launch, told)
        end_now(told.code)
    time.sleep(UNTIL_THE_FIRST_SPOKE)
    if isinstance(error, OfEveryWorker):
        end_now(told.code)
    _say(launch, told)
    os.kill(os.getpid(), signal.SIGKILL)  # a plain exit would leave those alone who wait in MPI for this worker
    end_now(told.code)


def _open_groups(
    launch: Launch, store: Store, device_type: str, timeout: float
) -> tuple[ProcessGroup | None, ProcessGroup | None]:
    """The device's group, and the host's: small sums there must not queue behind the gradients'."""
    import torch
    import torch.distributed as dist

    # Longer than the watch's patience: it knows who is to blame, a collective that gives up does not.
    patience = timedelta(seconds=2 * timeout + 60)
    device = None
    if device_type == "cuda":
        device = torch.device("cuda", 0)  # see devices.own_gpu
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=patience, device_id=device
    )
    return dist.group.WORLD, dist.new_group(backend="gloo", timeout=patience)


def _close_groups() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _on_terminate(expected: object, handler: object) -> object:
    """Let `handler` answer SIGTERM where `expected` did. Returns what did before."""
    if threading.current_thread() is not threading.main_thread():
        return signal.SIG_DFL
    before = signal.getsignal(signal.SIGTERM)
    if before == expected:
        signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    return before
