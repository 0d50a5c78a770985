"""A run's checkpoints as the run sees them: where it goes on from, and after which steps it saves."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from apps.training.checkpointing.publishing import BEING_WRITTEN, clean, remove_later, require_no_later
from apps.training.checkpointing.reading import Checkpoint, open_checkpoint
from apps.training.checkpointing.resume import (
    goes_on_in_place,
    require_same_choice,
    require_same_run,
    save_folder,
    tell_other_rows,
)
from apps.training.checkpointing.shares import fingerprint, frozen_of, weights_of
from apps.training.checkpointing.static_files import static_files
from apps.training.checkpointing.writer import CheckpointWriter
from apps.training.config import to_mapping
from apps.training.config_schema import TrainConfig
from apps.training.data.storage import Dataset
from apps.training.files import require_writable
from apps.training.host_copy import HostScalars
from apps.training.lora import is_on
from apps.training.nonfinite import NonFiniteLoss, are_finite, spoilt_weights
from apps.training.outcome import Outcome
from apps.training.parameter_groups import parameter_groups, state_elements
from apps.training.reporting.output_folder import require_room
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.step_plan import StepPlan
from apps.training.workers.group import Workers
from backends.errors import UserError
from backends.precision import BITS

PUBLISHED_WITHIN = 300.0  # seconds that a worker which fails waits for the others' shares of the last checkpoint


def run_identity(config: TrainConfig, plan: StepPlan, dataset: Dataset, rows_per_step: int) -> dict[str, Any]:
    """What makes a run this one: with any of it changed, to go on would not be to resume."""
    spec = plan.spec
    rows = json.dumps(dict(dataset.metadata), sort_keys=True, default=str).encode()
    return {
        "model": spec.model | {"max_seq_length": spec.max_seq_length, "article_attention": spec.article_attention},
        "optimizer": {"name": config.optimizer.name} | _rules(spec.optimizer),
        "precision": spec.precision,
        "routing": spec.routing,
        "lora": spec.lora,
        "seed": config.training.seed,
        "dataset": f"{dataset.num_train_rows} rows, metadata {hashlib.sha256(rows).hexdigest()[:12]}",
        "global_batch_size": rows_per_step,
    }


def _rules(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Which rule updates what, where there are several: their state is of different shapes."""
    rules = {key: fields["parameters"] for key, fields in optimizer.get("rules", {}).items()}
    return {"rules": rules} if rules else {}


@dataclass(frozen=True)
class Resumed:
    """What earlier starts of the run have done: nothing, or everything up to update `step`."""

    step: int = 0
    records: list[StepRecord] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    checkpoint: Checkpoint | None = None

    @property
    def sums(self) -> dict[str, float]:
        """The running sums of the statistics, as they were at the checkpoint."""
        return {} if self.checkpoint is None else dict(self.checkpoint.state.get("statistics", {}))

    def last_step(self, total: int, num_steps: int | None) -> int:
        """The last step to take now: of the whole run's `total`, or `num_steps` from here."""
        return total if num_steps is None else min(total, self.step + num_steps)

    def leaves_nothing(self, config: TrainConfig, total: int) -> bool:
        """Whether the run of `total` steps has ended in its own folder: with its evaluation, if it is to have one."""
        if self.checkpoint is None or not goes_on_in_place(config, self.checkpoint.path) or self.step < total:
            return False
        evaluated = bool(self.evaluations) and self.evaluations[-1].step == self.step
        return (evaluated or not config.training.evaluate) and Path(config.training.output_dir, "report.html").exists()

    def load(self, model: nn.Module, program: Any, rank: int) -> None:
        """Put the state after update `step` into place."""
        if self.checkpoint is None:
            return
        self.checkpoint.require_base(model)
        self.checkpoint.load_weights(model)
        self.checkpoint.load_optimizer(program)
        self.checkpoint.load_buffers(model, rank)
        self.checkpoint.load_rng(rank)
        print(f"Going on after step {self.step}: {self.checkpoint.path}", flush=True)


def open_resumed(path: Path | None, identity: Mapping[str, Any], config: TrainConfig, workers: Workers) -> Resumed:
    """The checkpoint `path`, whose bytes were checked, as what to go on from.

    UserError when it is of another run, or when another worker found another one. Every worker calls it.
    """
    require_same_choice(path, workers)
    if path is None:
        return Resumed()
    checkpoint = open_checkpoint(path, is_checked=True)
    require_same_run(checkpoint.state, identity, path=path, overwrite_config=config.checkpoint.overwrite_config)
    tell_other_rows(checkpoint.state, identity, checkpoint.step)
    return Resumed(checkpoint.step, checkpoint.records, checkpoint.evaluations, checkpoint)


class Saver:
    """Saves after the steps that the settings name, after the last one, and where Ctrl-C ends the run."""

    def __init__(
        self,
        config: TrainConfig,
        identity: Mapping[str, Any],
        model: nn.Module,
        program: Any,
        tokenizer: Path | None,
        workers: Workers,
        last_step: int,
    ) -> None:
        self.config, self.model, self.program, self.last_step = config, model, program, last_step
        self.workers = workers
        self.is_first, self.overwrite = workers.is_first, config.training.overwrite_output_dir
        self.folder, self.settings = save_folder(config), config.checkpoint
        self.state: dict[str, Any] = {"settings": to_mapping(config), "run": dict(identity)}
        self._saved_step = self._saved_evaluations = 0
        self._failure: UserError | None = None
        self._writer: CheckpointWriter | None = None
        self._finite: HostScalars | None = None  # of the weights that were copied
        # Without checkpoints too: a tokenizer that cannot be loaded is better told now than after the last step.
        static = static_files(model, tokenizer) if workers.is_first else {}
        if config.checkpoint.save:
            if workers.is_first and (frozen := frozen_of(model)):
                self.state["base"] = fingerprint(frozen)
            self._writer = CheckpointWriter(
                self.folder,
                rank=workers.rank,
                world_size=workers.world_size,
                keep=config.checkpoint.keep,
                static={} if is_on(config.lora) else static,
                sharded_optimizer=config.training.shard_optimizer,
            )

    @property
    def nbytes(self) -> int:
        """About what one checkpoint takes on the disk: weights, moments, masters, and what statistics need, of all."""
        precision = self.config.precision
        master = 0 if precision.master == "none" else BITS[precision.master]
        bits = BITS[precision.parameters] + precision.master_bits
        if self.config.logging.stats_every is not None:
            bits += 2 * max(BITS[precision.parameters], master, 32)
        bits *= sum(weight.numel() for weight in weights_of(self.model).values())
        moments = state_elements(parameter_groups(self.config.optimizer, self.model))
        return (bits + moments * BITS[precision.moments]) // 8

    def start(self, resumed_step: int, num_evaluations: int = 0) -> None:
        """Make sure that checkpoints can be written; take away what a killed run left. Call it under the run's lock.

        `num_evaluations`: how many the checkpoint of `resumed_step` tells of.
        UserError when they cannot, or when later checkpoints of another run lie there.
        """
        if (self.folder / f"iter_{resumed_step}").exists():
            self._saved_step, self._saved_evaluations = resumed_step, num_evaluations
        if self._writer is None:
            return
        self._writer.prepare(self.nbytes, next(self.model.parameters()).device)
        if not self.is_first:
            return
        require_writable(self.folder, "checkpoint.save_path")
        require_room(self.folder, self.nbytes, "checkpoint.save_path")
        require_no_later(self.folder, resumed_step, overwrite=self.overwrite)
        clean(self.folder)
        if self.overwrite:  # otherwise the later ones are damaged; a person may yet mend one, and ours replaces it
            remove_later(self.folder, resumed_step)

    def on_queued(self, step: int) -> bool:
        """The device has been given `step` and nothing behind it: copy it, if it is to be saved.

        Returns whether its numbers are needed before the next step is queued: that one is saved too, and there is
        memory for one copy.
        """
        if self._writer is None or not self._is_saved(step):
            return False
        self._wait_for_disk()
        self._writer.snapshot(step, self.model, self.program)
        self._finite = HostScalars({"weights": are_finite(self.model)})
        return self._is_saved(step + 1)

    def on_record(self, step: int, outcome: Outcome) -> None:
        """The numbers of `step` are there: write what was copied of it.

        NonFiniteLoss for weights that are no numbers: they would take the place of the last good ones.
        """
        if self._finite is not None and self._is_saved(step):
            if not self._finite.read()["weights"]:
                raise NonFiniteLoss(spoilt_weights(step))
            self._write(step, outcome)

    def on_end(self, outcome: Outcome) -> None:
        """The steps are over, perhaps before the last one: save where they ended, and wait until nothing is written.

        The run's folder is exchanged for the one with the final weights next; a failure can wait for `finish`.
        """
        step = outcome.last_step
        if self._writer is None:
            return
        if (step, len(outcome.evaluations)) > (self._saved_step, self._saved_evaluations):
            self._wait_for_disk()
            if are_finite(self.model):
                self._writer.snapshot(step, self.model, self.program)
                self._write(step, outcome)
            else:
                self._failure = UserError(spoilt_weights(step))
        self.settle()

    def settle(self) -> None:
        """Wait until nothing is being written: the process may end then, for whatever reason."""
        if self._writer is None:
            return
        self._wait_for_disk()
        try:
            self._writer.wait()
        except UserError as error:
            self._failure = error

    @contextmanager
    def settled_on_error(self) -> Iterator[None]:
        """An error that ends the job waits until the checkpoint on its way is complete: it may hold hours of work.

        The job ends with the first worker that fails, so that one waits for the first worker's last touch too.
        """
        try:
            yield
        except Exception:  # Ctrl-C that is meant does not wait
            self.settle()
            deadline = time.monotonic() + PUBLISHED_WITHIN
            while not self.is_first and self._failure is None and time.monotonic() < deadline:
                if not (self.folder / f"{BEING_WRITTEN}iter_{self._saved_step}").exists():
                    break
                self.workers.doing(f"writing the checkpoint of step {self._saved_step}")
                time.sleep(0.01)
            raise

    def finish(self) -> None:
        """Say where the last checkpoint lies. UserError when it could not be written."""
        if self._failure is not None:
            raise self._failure
        if self._writer is not None and self._saved_step:
            print(f"Checkpoint to go on from saved at {self.folder}/iter_{self._saved_step}/", flush=True)

    def _is_saved(self, step: int) -> bool:
        steps = self.settings.save_steps
        chosen = step in steps if isinstance(steps, list) else step % steps == 0
        return chosen or step == self.last_step

    def _wait_for_disk(self) -> None:
        """Until the last checkpoint is written. A slow disk is no reason to end the job: the watch is told."""
        while self._writer is not None and self._writer.is_writing:
            self.workers.doing(f"writing the checkpoint of step {self._saved_step}")
            time.sleep(0.01)

    def _write(self, step: int, outcome: Outcome) -> None:
        assert self._writer is not None
        state = self.state | ({"statistics": dict(outcome.sums)} if outcome.sums else {})
        self._writer.write(state, outcome.steps, outcome.evaluations)
        self._saved_step, self._saved_evaluations = step, len(outcome.evaluations)
