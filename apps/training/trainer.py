"""The training loop and the evaluation, over any program: compiled or eager, on any device.

A program updates the model in place and gives its loss as a tensor on the device. On a GPU that tensor is read one step
late: while the host waits for the loss of step n, step n+1 is already queued, so the device never waits for the host.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from apps.training.data.packing import Rows
from apps.training.host_copy import HostScalars
from apps.training.hyperparameters import hyperparameter_table
from apps.training.loss import Batch, make_batch, microbatches
from apps.training.nonfinite import require_finite
from apps.training.recipe import Recipe
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.statistics import MeasuredStep, RunStatistics
from apps.training.steps import StepCount
from backends.precision import PrecisionPolicy, as_torch, at_least_float32


class StepResult(Protocol):
    """0-d tensors on the device; `grad_norm` is None without clipping, `objective` where it is the loss, `applied`
    where an update cannot be skipped."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def grad_norm(self) -> Tensor | None: ...
    @property
    def objective(self) -> Tensor | None: ...
    @property
    def applied(self) -> Tensor | None: ...


class Program(Protocol):
    """A train step over a model it updates in place. `compiled.program` and `eager_program` have one each."""

    def train_step(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        hyperparameters: Tensor,
        max_grad_norm: float | None,
        max_grad_value: float | None,
    ) -> StepResult: ...
    def evaluate(self, microbatch: Mapping[str, Tensor]) -> Tensor: ...
    def calibrate(self, microbatches: Sequence[Mapping[str, Tensor]]) -> None: ...


class Workers(Protocol):
    """The workers of the job, as far as the loop needs them. `workers.group.Workers` is the real one."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def sum_counts(self, *numbers: int) -> tuple[int, ...]: ...
    def sum_(self, tensor: Tensor) -> Tensor: ...
    def doing(self, what: str) -> None: ...
    def waiting(self, what: str) -> None: ...
    def busy(self, what: str) -> AbstractContextManager[None]: ...


@dataclass(frozen=True)
class Trainer:
    """Steps and evaluations of one run, of which this is one worker.

    `names` are those of the model's parameters, in order; a step takes `accumulation` microbatches of each worker. It
    runs the steps `first_step` to `last_step` of the `count.total` that the whole run has.
    """

    program: Program
    workers: Workers
    names: Sequence[str]
    recipe: Recipe
    count: StepCount
    accumulation: int
    device: torch.device
    precision: PrecisionPolicy
    article_attention: bool
    first_step: int
    last_step: int
    skipped_before: int = 0  # steps in a row, up to `first_step`
    statistics: RunStatistics | None = None

    @cached_property
    def loss_dtype(self) -> torch.dtype:
        """The dtype of grad_scale: the logits', or at least float32 (1/N in bfloat16 would be off by up to 0.4 %)."""
        return as_torch(at_least_float32(self.precision.logits))

    @cached_property
    def update_dtype(self) -> torch.dtype:
        """The dtype of the update's arithmetic, and so of its numbers: the masters', or at least float32."""
        master = self.precision.master
        return as_torch(at_least_float32(self.precision.parameters) if master == "none" else master)

    def steps(
        self,
        rows: Iterable[Rows],
        *,
        pause_after: Callable[[int], bool],
        should_stop: Callable[[], bool],
        on_queued: Callable[[int], bool | None] = lambda step: None,
    ) -> Iterator[StepRecord]:
        """Run the steps and yield each one's record.

        `on_queued(step)` is called when the device has been given the step and nothing after it: what is queued there
        sees the model exactly at that step; when it returns true, the step's record is yielded before the next step is
        queued. So it is after a measured step (the next one's clock readings would replace its own), and after one for
        which `pause_after(step)` is true, where the time until the generator is resumed counts for no step. Ends early,
        after a whole step and the same one on every worker, when `should_stop()` says so on any, and after
        `max_nonfinite_steps` skipped in a row. Raises NonFiniteLoss.
        """
        in_a_row, most = self.skipped_before, self.recipe.max_nonfinite_steps
        supply = iter(rows)
        waiting: list[_Queued] = []
        begin = time.perf_counter()
        for step in range(self.first_step, self.last_step + 1):
            queued = self._queue(step, supply, should_stop)
            if queued is None:
                break
            waiting.append(queued)
            is_wanted = bool(on_queued(step)) or queued.measured is not None
            settle = self.device.type == "cpu" or step == self.last_step or is_wanted or pause_after(step)
            # what may be the last straw is waited for
            while len(waiting) > (0 if settle or 0 < most <= in_a_row + 1 else 1):
                record = self._record(waiting.pop(0), begin)
                begin = time.perf_counter()
                in_a_row = in_a_row + 1 if record.skipped else 0
                yield record
                if 0 < most <= in_a_row:
                    return
            if pause_after(step):
                begin = time.perf_counter()
        for late in waiting:
            yield self._record(late, begin)
            begin = time.perf_counter()

    def calibrate(self, rows: Iterable[Rows], passes: int) -> None:
        """Let the backends see their ranges on the rows of the first `passes` steps; a resumed run did so before."""
        supply = iter(rows)
        for number in range(1, (passes if self.first_step == 1 else 0) + 1):
            self.workers.doing(f"calibrating the backends, pass {number} of {passes}")
            batches = self._read(supply)
            first_rows = self._first_rows(0, batches)
            self.program.calibrate(
                microbatches(batches, device=self.device, dtype=self.loss_dtype, first_rows=first_rows)
            )

    def evaluate(
        self, rows: Iterable[Rows], step: int, on_batch: Callable[[], None], *, should_stop: Callable[[], bool]
    ) -> Evaluation | None:
        """Mean loss over every counted position of `rows`, each once; None when `should_stop` said so on the way."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        counted = 0
        for number, each in enumerate(rows):
            if should_stop():
                break
            batch = make_batch(each, article_attention=self.article_attention)
            first_rows = self._first_rows(number, [batch])
            (tensors,) = microbatches([batch], device=self.device, dtype=self.loss_dtype, first_rows=first_rows)
            total += self.program.evaluate(tensors).double() * batch.num_counted
            counted += batch.num_counted
            self.workers.doing(f"evaluating after step {step}")
            on_batch()
        self.workers.waiting(f"waiting for the others' evaluation after step {step}")
        counted, stops = self.workers.sum_counts(counted, int(should_stop()))
        if stops:
            return None
        return Evaluation(step=step, loss=self.workers.sum_(total).item() / max(counted, 1), num_counted=counted)

    def _queue(self, step: int, supply: Iterator[Rows], should_stop: Callable[[], bool]) -> _Queued | None:
        """Hand one optimizer step to the device; None when a worker asks to stop before it."""
        self.workers.doing(f"reading rows of step {step}")
        begin = time.perf_counter()
        batches = self._read(supply)
        reading = time.perf_counter() - begin
        counts = (sum(batch.num_counted for batch in batches), sum(batch.num_tokens for batch in batches))
        self.workers.waiting(f"waiting for the others to begin step {step}")
        num_counted, num_tokens, stops = self.workers.sum_counts(*counts, int(should_stop()))
        if stops:
            return None
        self.workers.doing(f"computing step {step}")
        if self.statistics is not None:
            self.statistics.begin(step)
        recipe = self.recipe
        lr = recipe.rate(step, recipe.peak)
        table = hyperparameter_table(
            self.names,
            recipe.groups,
            step=step,
            rate=lambda peak: recipe.rate(step, peak),
            dtype=self.update_dtype,
            rounding_seed=recipe.rounding_seed,
        )
        result = self.program.train_step(
            microbatches(
                batches,
                device=self.device,
                dtype=self.loss_dtype,
                num_counted=num_counted,
                first_rows=self._first_rows(0, batches),
            ),
            _to_device(table, self.device),
            self.recipe.max_grad_norm,
            self.recipe.max_grad_value,
        )
        scalars = {name: getattr(result, name) for name in ("loss", "grad_norm", "objective", "applied")}
        measured = None if self.statistics is None else self.statistics.copy(reading)
        return _Queued(
            step, self.count.position(step).epoch, lr, num_tokens, num_counted, HostScalars(scalars), measured
        )

    def _record(self, queued: _Queued, begin: float) -> StepRecord:
        record = queued.record(begin)
        require_finite(record, bounds_values=self.recipe.max_grad_value is not None)
        if self.statistics is not None:
            self.statistics.tell(record, queued.measured)
        return record

    def _read(self, supply: Iterator[Rows]) -> list[Batch]:
        """This worker's batches of the next step."""
        rows = islice(supply, self.accumulation)
        return [make_batch(each, article_attention=self.article_attention) for each in rows]

    def _first_rows(self, number: int, batches: Sequence[Batch]) -> list[int]:
        """Where this worker's batches, from its batch `number` on, begin in the rows that the loaders deal out."""
        workers = self.workers
        return [
            ((number + index) * workers.world_size + workers.rank) * len(batch.input_ids)
            for index, batch in enumerate(batches)
        ]


@dataclass(frozen=True)
class _Queued:
    """A step the device has been given, whose numbers may not be there yet. Counts are of the whole job."""

    step: int
    epoch: int
    lr: float
    num_tokens: int
    num_counted: int
    scalars: HostScalars
    measured: MeasuredStep | None

    def record(self, begin: float) -> StepRecord:
        """Wait for the step's numbers; its time runs from `begin` to now."""
        scalars = self.scalars.read()
        return StepRecord(
            step=self.step,
            epoch=self.epoch,
            loss=scalars["loss"],
            lr=self.lr,
            num_tokens=self.num_tokens,
            num_counted=self.num_counted,
            seconds=time.perf_counter() - begin,
            grad_norm=scalars.get("grad_norm"),
            objective=scalars.get("objective"),
            skipped=int(not scalars.get("applied", True)),
        )


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
