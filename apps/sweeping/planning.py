"""Which artifacts the trials need, and how much work each is, found out before anything starts.

Planning builds every model without weights and asks for the device. It is done in a process of its own: the sweep
itself holds no GPU while its runs need it.
"""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from apps.sweeping.trials import Planned, Trial
from apps.training import optimizers
from apps.training.config import parse, to_mapping
from apps.training.config_schema import TrainConfig
from backends.errors import UserError

if TYPE_CHECKING:
    from apps.training.step_plan import StepPlan

T = TypeVar("T")
# They change no step, so that trials which differ in nothing else are planned once.
NOT_PLANNED = (
    "dataset",
    "max_steps",
    "token_budget",
    "num_epochs",
    "seed",
    "output_dir",
    "max_grad_norm",
    "max_grad_value",
    "eval_steps",
)


def plan(trials: Sequence[Trial]) -> None:
    """Fill in `planned` of all trials. UserError for the first whose step or dataset cannot be: it names the trial."""
    asked = [(trial.point.name, trial.arguments) for trial in trials]
    for trial, planned in zip(trials, in_own_process(plan_all, asked), strict=True):
        trial.planned = planned


def artifacts_to_compile(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """The trials that wait for each artifact that is not there, in their order."""
    missing: dict[str, list[Trial]] = {}
    for trial in trials:
        planned = trial.planned
        if trial.status != "done" and planned is not None and planned.artifact is not None and not planned.is_there:
            missing.setdefault(planned.artifact, []).append(trial)
    return missing


def in_own_process(function: Callable[..., T], *arguments: object) -> T:
    """`function(*arguments)` in a fresh process, which a Ctrl-C for this one leaves alone."""
    ignored = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=signal.signal, initargs=ignored) as pool:
        return pool.submit(function, *arguments).result()


def plan_all(asked: Sequence[tuple[str, Sequence[str]]]) -> list[Planned]:
    """The steps of trials given as (name, arguments)."""
    plans: dict[str, StepPlan] = {}
    planned = []
    for name, arguments in asked:
        try:
            planned.append(_plan(parse(["command=run", *arguments]), plans))
        except UserError as error:
            raise UserError(str(error) if len(asked) == 1 else f"Of {name}: {error}") from None
    return planned


def _plan(config: TrainConfig, plans: dict[str, StepPlan]) -> Planned:
    from apps.training.programs import require_artifact
    from apps.training.reporting.throughput import training_flops_per_token
    from apps.training.step_plan import plan_step
    from compiled.artifact import Artifact, find

    same_step = _step_settings(config)
    if same_step not in plans:
        plans[same_step] = plan_step(config)
    step = plans[same_step]
    num_rows = _num_rows(config, step)
    flops = training_flops_per_token(step.model_config, step.num_parameters, config.model.max_seq_length)
    work = flops * _tokens(config, step, num_rows)
    folder = Path(config.compile.output_dir)
    if config.compile.target == "eager" or config.run.artifact is not None:
        require_artifact(config, step)  # one that is named has to fit
        return Planned(None, True, step.num_parameters, work)
    is_there = isinstance(find(folder, step.spec), Artifact)
    return Planned(str(folder / step.spec.key), is_there, step.num_parameters, work)


def _num_rows(config: TrainConfig, step: StepPlan) -> int:
    """Train rows of the dataset; it has to fit the model. 1 for the embedded corpus, which may not be prepared yet."""
    from apps.training.data.storage import open_dataset

    training = config.training
    if training.dataset is None:
        return 1
    return open_dataset(
        training.dataset,
        max_seq_length=config.model.max_seq_length,
        vocab_size=step.model_config.vocab_size,
        batch_size=training.batch_size,
        evaluate=training.evaluate or training.eval_steps is not None,
    ).num_train_rows


def _tokens(config: TrainConfig, step: StepPlan, num_rows: int) -> int:
    """Positions a run of one worker goes through; UserError for a budget that comes to nothing."""
    from apps.training.steps import count_steps

    training = config.training
    rows = training.global_batch_size or training.batch_size * training.gradient_accumulation_steps
    per_step = rows * config.model.max_seq_length
    return count_steps(max(num_rows // rows, 1), training, tokens_per_step=per_step, sizes=step.sizes).total * per_step


def _step_settings(config: TrainConfig) -> str:
    """The settings without those that change no step."""
    settings = to_mapping(config)
    del settings["schedule"], settings["logging"]
    for name in NOT_PLANNED:
        del settings["training"][name]
    in_graph = optimizers.load(config.optimizer.name).structure
    for field in dataclasses.fields(config.optimizer.settings):
        if field.name not in in_graph:
            del settings["optimizer"][field.name]
    return json.dumps(settings)
