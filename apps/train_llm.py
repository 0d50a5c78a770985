"""Compile a language model's train step into an artifact, and train from it.

    python apps/train_llm.py command=compile checkpoint.config_name=demo model.max_seq_length=256 training.batch_size=8
    python apps/train_llm.py command=run checkpoint.config_name=demo training.dataset=DIR training.max_steps=200
    mpirun -np 4 python apps/train_llm.py command=run …      the same with four workers (torchrun and srun do as well)
    python apps/train_llm.py --help

Exit codes: 0 done, 1 the loss became NaN or infinite or a worker was lost, 2 a mistake in what was given (one line says
which), 130 stopped by Ctrl-C (the step was finished and everything saved).

This file is the map of the house: read it from top to bottom and follow a name where you want to know more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.training.checkpointing.resume import goes_on_in_place, resumed_settings, run_folders, save_folder
from apps.training.cli import INTERRUPTED, first_alone, run_main
from apps.training.config import parse, to_yaml
from apps.training.config_schema import TrainConfig
from apps.training.reporting.output_folder import require_free, require_room, start_run
from apps.training.workers.launch import find_launch, own_gpu

if TYPE_CHECKING:
    from apps.training.checkpointing.saving import Saver
    from apps.training.data.loader import TrainLoader
    from apps.training.interrupt import StopRequest
    from apps.training.outcome import Outcome
    from apps.training.step_plan import StepPlan
    from apps.training.trainer import Trainer
    from apps.training.workers.group import Workers

LOSS_NOT_FINITE = 1


def program(argv: Sequence[str]) -> int:
    """Settings first: a mistake in them is answered before PyTorch is imported."""
    config = parse(argv)
    if config.command == "compile":
        return first_alone(lambda: compile_step(config)) or 0
    return train(*resumed_settings(argv, config))


# ----------------------------------------------------------------------------------------------------------------------
# command=compile: settings → model without weights → captured regions → machine code → one file


def compile_step(config: TrainConfig) -> int:
    from apps.training.compilers import compilers_of

    with compilers_of(config.compile) as compilers:  # they start while we import what follows
        from apps.training.compile_command import compile_artifact, debug_folder, region_table, summary
        from apps.training.step_plan import plan_step

        plan = plan_step(config)
        print(plan.routing.table())
        artifact = compile_artifact(config, plan, compilers)
    if config.compile.verbose:
        print(region_table(artifact))
    if config.compile.debug:
        print(f"Graphs and generated code: {debug_folder(artifact.path)}/")
    print(summary(artifact, plan))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# command=run: settings → step and its artifact → data → weights → steps → evaluation → checkpoint and report


def train(config: TrainConfig, checkpoint: Path | None) -> int:
    """Open the run's workers, of which this process is one; a failure of any ends the whole job."""
    output, settings = Path(config.training.output_dir), config.training
    overwrite = settings.overwrite_output_dir or goes_on_in_place(config, checkpoint)
    require_free(output, overwrite=overwrite, unfinished=settings.resume == "auto", checkpoints=save_folder(config))

    from apps.training.lock import locked
    from apps.training.step_plan import plan_step
    from apps.training.workers.group import open_workers

    launch = own_gpu(find_launch())
    plan = plan_step(config)
    with (
        open_workers(launch, device_type=plan.spec.device["kind"], timeout=settings.worker_timeout) as workers,
        locked(run_folders(config)) if workers.is_first else nullcontext(),
    ):
        return train_as_worker(config, plan, checkpoint, workers)


def train_as_worker(config: TrainConfig, plan: StepPlan, checkpoint: Path | None, workers: Workers) -> int:
    from apps.training.checkpointing.saving import Saver, open_resumed, run_identity
    from apps.training.data.loader import TrainLoader
    from apps.training.data.of_run import find_dataset
    from apps.training.devices import describe, open_device
    from apps.training.efficiency import efficiency_of
    from apps.training.interrupt import StopRequest
    from apps.training.memory import available_memory, gibibytes, require_memory
    from apps.training.models import load_weights
    from apps.training.nonfinite import ended_over_skipped, skipped_in_a_row
    from apps.training.outcome import Outcome, save_outcome
    from apps.training.parameter_groups import groups_table
    from apps.training.programs import make_program, require_artifact, run_memory
    from apps.training.recipe import make_recipe
    from apps.training.reporting.lines import overview, settings_text, tell_unread
    from apps.training.statistics import make_statistics
    from apps.training.steps import accumulation_steps, count_steps
    from apps.training.trainer import Trainer

    # The step: which model, which backend computes which layer, and the machine code for it. No weights yet.
    settings, output, length = config.training, Path(config.training.output_dir), config.model.max_seq_length
    artifact = require_artifact(config, plan)
    device = open_device(plan.spec.device["kind"], config, workers)
    kept_from = None if config.checkpoint.overwrite_config else checkpoint
    accumulation = accumulation_steps(settings, workers.world_size, kept_from=kept_from)
    free = available_memory(str(device), workers.local_world_size, config.run.memory_gib)
    memory = run_memory(config, plan, artifact, accumulation=accumulation, world_size=workers.world_size, free=free)
    require_memory(memory, free, str(device))
    require_room(output, memory.parameters)
    tell_unread(config, checkpoint)
    print(f"Model: {plan.model_name}, {plan.parameters_text}; dtypes: {plan.precision.table()}")
    print(f"{plan.routing.table()}\nStep: {artifact.path if artifact else 'eager, without an artifact'}")
    print(f"Device: {describe(device)}; about {memory} needed, {gibibytes(free)} free", flush=True)

    # The data: rows in an order that the seed alone decides; this worker's share of each step.
    rows_per_step = settings.batch_size * accumulation * workers.world_size
    dataset = find_dataset(config, plan.model_config.vocab_size, rows_per_step, workers)
    identity = run_identity(config, plan, dataset, rows_per_step)
    resumed = open_resumed(checkpoint, identity, config, workers)
    loader = TrainLoader(
        dataset,
        batch_size=settings.batch_size,
        seed=settings.seed,
        rank=workers.rank,
        world_size=workers.world_size,
        gradient_accumulation_steps=accumulation,
        start_batch=resumed.step * accumulation,
    )
    loader.check()
    count = count_steps(loader.steps_per_epoch, settings, tokens_per_step=rows_per_step * length, sizes=plan.sizes)
    print(f"Dataset: {loader.description()}")
    print(f"Optimizer: {settings_text(config.optimizer.name, config.optimizer.settings)}\n{groups_table(plan.groups)}")
    print(f"Schedule: {settings_text(config.schedule.name, config.schedule.settings)}", flush=True)
    if resumed.leaves_nothing(config, count.total):
        print(f"All {count.total} steps were taken: {checkpoint}. Nothing is left to do.")
        return 0

    # The weights, the program that updates them in place, and the recipe it is given, as tensors, at every step.
    workers.doing("loading the weights")
    model = load_weights(config, plan.model_config, device)
    program = make_program(config, plan, artifact, model, workers, recomputed=memory.recomputed)
    resumed.load(model, program, workers.rank)
    trainer = Trainer(
        program=program,
        workers=workers,
        names=[name for name, _ in model.named_parameters()],
        recipe=make_recipe(config, plan.groups, count.total),
        count=count,
        accumulation=accumulation,
        device=device,
        precision=plan.precision,
        article_attention=config.model.article_attention,
        first_step=resumed.step + 1,
        last_step=resumed.last_step(count.total, config.checkpoint.num_steps),
        skipped_before=skipped_in_a_row(resumed.records),
        statistics=make_statistics(config, plan, program, resumed),
    )

    # From here on we write. Ctrl-C lets the running step finish and everything be saved.
    saver = Saver(config, identity, model, program, dataset.tokenizer_folder, workers, trainer.last_step)
    outcome = Outcome(
        title=f"{plan.model_name} on {dataset.folder.name}",
        overview=overview(count, batch_size=settings.batch_size * accumulation, workers=workers.world_size),
        routed_table=plan.tables,
        num_parameters=plan.num_parameters,
        efficiency=efficiency_of(config, plan, artifact, device, workers, accumulation),
        steps=resumed.records,
        evaluations=resumed.evaluations,
        sums=trainer.statistics.sums if trainer.statistics else {},
    )
    print(outcome.overview, flush=True)
    saver.start(resumed.step, num_evaluations=len(resumed.evaluations))
    if workers.is_first:
        start_run(output, to_yaml(config))
    trainer.calibrate(loader, config.backend.calibrate_steps)
    with StopRequest() as stop:
        if not take_steps(config, trainer, loader, outcome, saver, stop):
            return LOSS_NOT_FINITE
        stopped = stop.requested or outcome.last_step < trainer.last_step  # by a signal to any worker
        if workers.is_first:
            with workers.busy("saving the model"):
                save_outcome(output, outcome, model, dataset, config, sample=not stopped)
        saver.finish()
        failed = ended_over_skipped(outcome.steps, settings.max_nonfinite_steps, tell=workers.is_first)
        return LOSS_NOT_FINITE if failed else INTERRUPTED if stopped else 0


def take_steps(
    config: TrainConfig, trainer: Trainer, loader: TrainLoader, outcome: Outcome, saver: Saver, stop: StopRequest
) -> bool:
    """Train, evaluate, save; `outcome`, CSV and screen get every step. False when a loss is no longer finite."""
    from apps.training.devices import memory_errors_told
    from apps.training.evaluating import Evaluator
    from apps.training.nonfinite import NonFiniteLoss
    from apps.training.progress import Progress
    from apps.training.reporting.lines import step_line
    from apps.training.reporting.run_reports import RunReports

    count, evaluator = trainer.count, Evaluator(config, trainer, loader, stop.asked)
    with (
        saver.settled_on_error(),
        memory_errors_told(),
        RunReports(config, outcome, trainer) if loader.rank == 0 else nullcontext() as reports,
        Progress(count.total, "Training", "steps", mode=config.logging.progress) as progress,
    ):
        progress.update(len(outcome.steps))
        steps = trainer.steps(loader, pause_after=evaluator.is_due, should_stop=stop.asked, on_queued=saver.on_queued)
        try:
            evaluator.make_up(outcome, progress)
            for record in steps:
                outcome.steps.append(record)
                if reports is not None:
                    reports.append(record, progress)
                if record.step % config.logging.every == 0 or record.step == count.total:
                    progress.write(step_line(record, count.position(record.step), loader.world_size))
                progress.update(1, **outcome.live_fields)
                if evaluator.is_due(record.step):
                    evaluator.evaluate(record.step, outcome, progress)
                saver.on_record(record.step, outcome)
        except NonFiniteLoss as error:
            progress.write(f"error: {error}", stream=sys.stderr)
            saver.settle()  # the last good checkpoint may still be on its way
            return False
    saver.on_end(outcome)
    return True


def main() -> int:
    return run_main(program, many_workers=True)


if __name__ == "__main__":
    sys.exit(main())
