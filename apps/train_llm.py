"""Compile a language model's train step into an artifact, and train from it.

    python apps/train_llm.py command=compile checkpoint.config_name=demo model.max_seq_length=256 training.batch_size=8
    python apps/train_llm.py command=run checkpoint.config_name=demo training.dataset=DIR training.max_steps=200
    python apps/train_llm.py --help

Exit codes: 0 done, 1 the loss became NaN or infinite, 2 a mistake in what was given (one line says which),
130 stopped by Ctrl-C (the step was finished and everything saved).

This file is the map of the house: read it from top to bottom and follow a name where you want to know more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.training.cli import INTERRUPTED, run_main
from apps.training.config import parse, to_yaml
from apps.training.config_schema import TrainConfig
from apps.training.reporting.output_folder import METRICS, MetricsFile, require_free, require_room, start_run
from backends.errors import UserError

if TYPE_CHECKING:
    from apps.training.data.loader import TrainLoader
    from apps.training.interrupt import StopRequest
    from apps.training.outcome import Outcome
    from apps.training.trainer import Trainer

LOSS_NOT_FINITE = 1


def program(argv: Sequence[str]) -> int:
    """Settings first: a mistake in them is answered before PyTorch is imported."""
    config = parse(argv)
    return compile_step(config) if config.command == "compile" else train(config)


# ----------------------------------------------------------------------------------------------------------------------
# command=compile: settings → model without weights → captured regions → machine code → one file


def compile_step(config: TrainConfig) -> int:
    from apps.training.compile_command import compile_artifact, debug_folder, region_table, summary
    from apps.training.step_plan import plan_step

    plan = plan_step(config)
    print(plan.routing.table())
    artifact = compile_artifact(config, plan)
    if config.compile.verbose:
        print(region_table(artifact))
    if config.compile.debug:
        print(f"Graphs and generated code: {debug_folder(artifact.path)}/")
    print(summary(artifact, plan))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# command=run: settings → step and its artifact → data → weights → steps → evaluation → checkpoint and report


def train(config: TrainConfig) -> int:
    output = Path(config.training.output_dir)
    require_free(output, overwrite=config.training.overwrite_output_dir)

    from apps.training.data.loader import TrainLoader
    from apps.training.data.prepare import default_dataset
    from apps.training.data.storage import open_dataset
    from apps.training.devices import describe, open_device, peak_of
    from apps.training.interrupt import StopRequest
    from apps.training.memory import available_memory, gibibytes, require_memory
    from apps.training.models import load_weights
    from apps.training.outcome import Outcome, save_outcome
    from apps.training.programs import make_program, require_artifact, run_memory
    from apps.training.reporting.lines import overview, settings_text
    from apps.training.reporting.throughput import training_flops_per_token
    from apps.training.step_plan import plan_step
    from apps.training.steps import count_steps
    from apps.training.trainer import Trainer, make_recipe

    # The step: which model, which backend computes which layer, and the machine code for it. No weights yet.
    plan = plan_step(config)
    artifact = require_artifact(config, plan)
    device = open_device(plan.spec.device["kind"], config.run.num_threads)
    memory, free = run_memory(config, plan, artifact), available_memory(str(device))
    require_memory(memory, free, str(device))
    require_room(output, memory.parameters)
    num_parameters = sum(parameter.numel() for parameter in plan.model.parameters())
    print(f"Model: {plan.model_name}, {num_parameters:,} parameters; dtypes: {plan.precision.table()}")
    print(plan.routing.table())
    print(f"Step: {artifact.path if artifact else 'eager, without an artifact'}")
    print(f"Device: {describe(device)}; about {memory} needed, {gibibytes(free)} free", flush=True)

    # The data: rows in an order that the seed alone decides.
    settings = config.training
    accumulation = settings.gradient_accumulation_steps
    length, vocabulary = config.model.max_seq_length, plan.model_config.vocab_size
    dataset = open_dataset(
        settings.dataset or default_dataset(length, vocabulary),
        max_seq_length=length,
        vocab_size=vocabulary,
        batch_size=settings.batch_size * accumulation,
        evaluate=settings.evaluate or settings.eval_steps is not None,
    )
    loader = TrainLoader(
        dataset, batch_size=settings.batch_size, seed=settings.seed, gradient_accumulation_steps=accumulation
    )
    loader.check()
    count = count_steps(loader.steps_per_epoch, num_epochs=settings.num_epochs, max_steps=settings.max_steps)
    rows = f"{dataset.num_train_rows:,} train rows ({loader.unused_rows} left over in each epoch, others every time)"
    print(f"Dataset: {dataset.folder}, {rows}, {dataset.num_dev_rows:,} dev rows")
    print(f"Optimizer: {settings_text(config.optimizer.name, config.optimizer.settings)}")
    print(f"Schedule: {settings_text(config.schedule.name, config.schedule.settings)}", flush=True)

    # The weights, the program that updates them in place, and the recipe it is given, as tensors, at every step.
    model = load_weights(config, plan.model_config, device)
    trainer = Trainer(
        program=make_program(config, plan, artifact, model),
        parameters=list(model.parameters()),
        recipe=make_recipe(
            config.optimizer, config.schedule, total_steps=count.total, max_grad_norm=settings.max_grad_norm
        ),
        count=count,
        accumulation=accumulation,
        device=device,
        precision=plan.precision,
        article_attention=config.model.article_attention,
    )

    # From here on we write. Ctrl-C lets the running step finish and everything be saved.
    positions = settings.batch_size * accumulation * length
    outcome = Outcome(
        title=f"{plan.model_name} on {dataset.folder.name}",
        overview=overview(num_epochs=count.num_epochs, batch_size=settings.batch_size, num_steps=count.total),
        routed_table=plan.routing.table(),
        num_parameters=num_parameters,
        flops_per_step=positions * training_flops_per_token(plan.model_config, num_parameters, length),
        peak=peak_of(device, plan.precision.compute),
    )
    print(outcome.overview, flush=True)
    start_run(output, to_yaml(config))
    with StopRequest() as stop:
        is_finite = take_steps(config, trainer, loader, outcome, stop)
        if not is_finite:
            return LOSS_NOT_FINITE
        save_outcome(output, outcome, model, dataset, config, sample=not stop.requested)
        return INTERRUPTED if stop.requested else 0


def take_steps(config: TrainConfig, trainer: Trainer, loader: TrainLoader, outcome: Outcome, stop: StopRequest) -> bool:
    """Train and evaluate; `outcome`, the CSV and the screen get every step. False when the loss is no longer finite."""
    from torch import OutOfMemoryError

    from apps.training.data.loader import dev_batches
    from apps.training.progress import Progress
    from apps.training.reporting.lines import evaluation_line, live_fields, step_line
    from apps.training.trainer import NonFiniteLoss

    settings, count = config.training, trainer.count

    def is_evaluated(step: int) -> bool:
        periodic = settings.eval_steps is not None and step % settings.eval_steps == 0
        return periodic or (settings.evaluate and step == count.total)

    def evaluate(step: int) -> None:
        progress.clear()
        batches = -(-loader.dataset.num_dev_rows // settings.batch_size)
        with Progress(batches, "Evaluating", "batches", mode=config.logging.progress) as evaluating:
            rows = dev_batches(loader.dataset, settings.batch_size)
            evaluation = trainer.evaluate(rows, step, evaluating.update, should_stop=lambda: stop.requested)
        if evaluation is not None:
            outcome.evaluations.append(evaluation)
            progress.write(evaluation_line(evaluation))

    with (
        MetricsFile(Path(settings.output_dir) / METRICS) as metrics,
        Progress(count.total, "Training", "steps", mode=config.logging.progress) as progress,
    ):
        try:
            for record in trainer.steps(loader, pause_after=is_evaluated, should_stop=lambda: stop.requested):
                outcome.steps.append(record)
                metrics.append(record)
                if record.step % config.logging.every == 0 or record.step == count.total:
                    progress.write(step_line(record, count.position(record.step)))
                progress.update(1, **live_fields(record, outcome.utilisation(record)))
                if is_evaluated(record.step):
                    evaluate(record.step)
        except NonFiniteLoss as error:
            progress.write(f"error: {error}", stream=sys.stderr)
            return False
        except OutOfMemoryError as error:
            raise UserError(
                f"{str(error).splitlines()[0]} Lower training.batch_size or model.max_seq_length."
            ) from error
    return True


def main() -> int:
    return run_main(program)


if __name__ == "__main__":
    sys.exit(main())
