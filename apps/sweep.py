"""Train once for every point of a grid of settings, and compare what comes out.

    python apps/sweep.py sweep='{optimizer.lr: [1e-5, 1e-4, 1e-3], training.seed: [1, 2]}' output_dir=outputs/sweeps/lr
        checkpoint.config_name=demo training.batch_size=4 training.max_steps=200    any setting of train_llm.py
    python apps/sweep.py sweep='{checkpoint.config_name: [clm-60m, clm-200m]}' training.token_budget='22*N/100' …
    python apps/sweep.py sweep=… launcher='mpirun -np 2' …                            each run on two workers
    python apps/sweep.py --help

Runs that differ in runtime settings only share an artifact, compiled once. Each run has a folder of its own, named by
its values. Stopped by Ctrl-C or killed, the sweep goes on by the same command: finished runs stay, an unfinished one
goes on from its last checkpoint (checkpoint.save=true) or starts over, and what failed is tried again.

Exit codes: 0 all runs are done, 1 one has failed, 2 a mistake in what was given (nothing was started), 130 Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.sweeping.grid import expand
from apps.sweeping.options import SweepOptions, read_options
from apps.sweeping.running import Runner, launcher_words, run_process
from apps.sweeping.trials import Trial, make_trials
from apps.training.cli import INTERRUPTED, run_main
from apps.training.workers.launch import find_launch
from backends.errors import UserError

A_RUN_FAILED = 1


def program(argv: Sequence[str], runner: Runner = run_process) -> int:
    """Everything that can be wrong is answered before the first compile; `runner` starts compiles and runs."""
    options, given = read_options(argv)
    launcher_words(options.launcher)
    if find_launch().world_size > 1:
        raise UserError(
            "The sweep was started by a launcher. Start it alone, with launcher='mpirun -np 2' for its runs."
        )
    output = Path(options.output_dir)
    trials = make_trials(expand(options.sweep.axes, options.sweep.mode), given, output)

    from apps.sweeping.planning import plan
    from apps.sweeping.record import take_over
    from apps.training.files import require_writable
    from apps.training.lock import locked

    require_writable(output, "output_dir")
    plan(trials)
    with locked({"output_dir": output}):
        take_over(output, trials, options.launcher)
        for trial in trials:
            trial.look()
        return go_through(trials, options, runner)


# ----------------------------------------------------------------------------------------------------------------------
# Compile what is missing, run what waits, and write what came out, however it ended


def go_through(trials: Sequence[Trial], options: SweepOptions, runner: Runner) -> int:
    from apps.sweeping.going import Sweep
    from apps.sweeping.table import write_csv
    from apps.training.interrupt import StopRequest

    output = Path(options.output_dir)
    print(overview(trials), flush=True)
    keep_csv = partial(write_csv, output / "sweep.csv", trials)
    with StopRequest() as stop:
        sweep = Sweep(
            trials,
            output,
            runner=runner,
            launcher=options.launcher,
            stop=stop.asked,
            stop_on_error=options.stop_on_error,
            after_each=keep_csv,
        )
        try:
            sweep.compile_all()
            sweep.run_all()
        finally:  # a second Ctrl-C too leaves a table of what there is
            report(trials, output)
        if stop.requested and any(trial.status in ("waiting", "stopped") for trial in trials):
            print("Stopped. The same command goes on.")
            return INTERRUPTED
    return A_RUN_FAILED if any(trial.status == "failed" for trial in trials) else 0


def overview(trials: Sequence[Trial]) -> str:
    """What there is to do."""
    from apps.sweeping.planning import artifacts_to_compile

    done = sum(trial.status == "done" for trial in trials)
    artifacts = len({trial.planned.artifact for trial in trials if trial.planned and trial.planned.artifact})
    to_compile = len(artifacts_to_compile(trials))
    return f"Sweep: {len(trials)} runs, {done} of them done; {artifacts} artifacts, {to_compile} of them to compile"


def report(trials: Sequence[Trial], output: Path) -> None:
    """sweep.csv, sweep.png, sweep.html, and the table on the terminal."""
    from apps.sweeping.page import render
    from apps.sweeping.picture import write_picture
    from apps.sweeping.table import text_table, write_csv
    from apps.training.files import atomic_path

    title = f"Sweep over {' × '.join(trials[0].point.labels)}"
    print(text_table(trials))
    write_csv(output / "sweep.csv", trials)
    has_picture = write_picture(output / "sweep.png", trials, title=title)
    with atomic_path(output / "sweep.html") as path:
        path.write_text(render(trials, title=title, subtitle=str(output)), encoding="utf-8")
    names = ["sweep.csv", *(["sweep.png"] if has_picture else []), "sweep.html"]
    print("Results saved at " + ", ".join(f"{output}/{name}" for name in names), flush=True)


def main() -> int:
    return run_main(program)


if __name__ == "__main__":
    sys.exit(main())
