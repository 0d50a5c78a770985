"""The settings of a sweep itself, told apart from those of its runs. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from apps.training.config import parse_dataclass
from apps.training.config_keys import plugin_packages
from apps.training.config_schema import TrainConfig, setting
from backends.errors import UserError

EXAMPLE = "sweep='{optimizer.lr: [1e-5, 1e-4], training.seed: [1, 2]}'"
NOTES = """The runs take every setting of train_llm.py, as it takes them: section.key=value, config=FILE.yaml,
+own.key=value; see train_llm.py --help. A key's values are a list, or a mapping that names them:
  sweep='{backend.rules: {dense: [], half: [{match: "*.mlp.*", use: NAME}]}, optimizer.lr: [1e-5, 1e-4]}'"""
# What the sweep decides for each run.
OWN = {
    "command": "a sweep compiles and runs by itself",
    "training.output_dir": "each run gets a folder of its own in output_dir",
    "training.overwrite_output_dir": "finished runs stay, unfinished ones go on",
    "checkpoint.save_path": "each run saves in its own folder",
}


@dataclass(frozen=True, kw_only=True)
class Axes:
    axes: dict[str, Any] = setting(factory=dict, help="KEY: [VALUES] of the settings to vary; short: sweep='{...}'")
    mode: Literal["grid", "zip"] = setting("grid", "grid: all combinations; zip: first values together, then second")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Train once for every combination of values that some settings are to have, and compare what comes out."""

    output_dir: str = setting("outputs/sweeps/default", "where runs, table and pictures go")
    launcher: str | None = setting(None, "words before each run's command: 'mpirun -np 2'")
    stop_on_error: bool = setting(False, "end the sweep when a run fails; else it goes on with the next")
    sweep: Axes = field(default_factory=Axes)


def read_options(argv: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """The sweep's own settings, and the arguments that all its runs are given.

    Raises UserError for a mistake in the former, and SystemExit after printing `--help`.
    """
    own: list[str] = []
    given: list[str] = []
    for argument in argv:
        (given if _is_of_runs(argument.partition("=")[0]) else own).append(argument)
    own = [f"sweep.axes{item.removeprefix('sweep')}" if item.startswith("sweep=") else item for item in own]
    options = parse_dataclass(SweepOptions, own, program="sweep.py", notes=lambda: NOTES)
    refuse_own(item.partition("=")[0] for item in given)
    if not options.sweep.axes:
        raise UserError(f"sweep is missing (the settings to vary, and their values). Expected {EXAMPLE}. See --help.")
    return options, given


def refuse_own(paths: Any) -> None:
    """UserError when one of the settings is the sweep's to make."""
    for path in paths:
        if path in OWN:
            raise UserError(f"'{path}' cannot be given to a sweep: {OWN[path]}. Leave it out.")


def _is_of_runs(path: str) -> bool:
    """Whether train_llm reads it. What has no section is the sweep's: a mistyped name is looked for there."""
    if path.startswith(("sweep.", "-")):
        return False
    return "." in path or path.startswith("+") or path in {"config", "command", *plugin_packages(TrainConfig)}
