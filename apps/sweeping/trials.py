"""A trial: one point of the sweep, its run's arguments and folder, and how far it has come. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apps.sweeping.grid import Point
from apps.sweeping.results import Result, read_result
from apps.training.config import parse
from apps.training.config_schema import TrainConfig
from backends.errors import UserError

Status = Literal["waiting", "done", "failed", "stopped"]
# Unless the command line says otherwise: go on from a run's own checkpoints, and leave its log readable.
DEFAULTS = {"training.resume": "auto", "logging.progress": "off"}


@dataclass(frozen=True)
class Planned:
    """What a trial's step is. `artifact`: which one it needs, equal for equal steps; None where none is compiled."""

    artifact: str | None
    is_there: bool
    num_parameters: int
    work: float  # FLOPs of the run, or a number in proportion to them


@dataclass
class Trial:
    point: Point
    folder: Path
    arguments: tuple[str, ...]  # of train_llm, but for the command
    config: TrainConfig
    planned: Planned | None = None
    status: Status = "waiting"
    error: str = ""
    result: Result | None = None

    @property
    def num_parameters(self) -> int | None:
        """Of the model, once the step is planned."""
        return self.planned.num_parameters if self.planned else None

    def look(self) -> None:
        """Take from its folder what the run came to. A complete one is done, whoever ran it."""
        self.result = read_result(self.folder)
        if self.result is not None and self.result.is_complete(evaluated=self.config.training.evaluate):
            self.status = "done"


def make_trials(points: Sequence[Point], given: Sequence[str], output: Path) -> list[Trial]:
    """A trial for each point, its settings checked. UserError for the first that cannot be: it names the point."""
    for key in points[0].labels:
        for argument in given:
            name, _, value = argument.partition("=")
            if name == key:
                raise UserError(f"'{key}' is swept, and given as {value} too. Leave one of them out.")
    common = _mistake(given, output / "any")
    trials = []
    for point in points:
        folder = output / point.name
        arguments = _run_arguments([*given, *point.arguments], folder)
        try:
            config = parse(["command=run", *arguments])
            if config.checkpoint.save_path is not None:
                raise UserError(
                    "checkpoint.save_path would be one folder for all runs. Leave it out, or set it to null."
                )
        except UserError as error:
            if str(error) == common or len(points) == 1:
                raise
            raise UserError(f"Of {point.name}: {error}") from None
        trials.append(Trial(point, folder, arguments, config))
    return trials


def _run_arguments(given: Sequence[str], folder: Path) -> tuple[str, ...]:
    named = {argument.partition("=")[0] for argument in given}
    defaults = [f"{key}={value}" for key, value in DEFAULTS.items() if key not in named]
    # The folder is the sweep's, so that what an unfinished run left there without a checkpoint may be replaced.
    return (*given, *defaults, f"training.output_dir={folder}", "training.overwrite_output_dir=true")


def _mistake(given: Sequence[str], folder: Path) -> str:
    """What is wrong with the settings that all runs share; "" if nothing is."""
    try:
        parse(["command=run", *_run_arguments(given, folder)])
    except UserError as error:
        return str(error)
    return ""
