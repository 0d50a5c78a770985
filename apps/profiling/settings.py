"""The settings of a profile itself, told apart from those of the step. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apps.training.config import parse, parse_dataclass
from apps.training.config_keys import plugin_packages
from apps.training.config_schema import TrainConfig, setting

NOTES = """The step takes the settings of its run, which say which artifact it is: checkpoint.config_name=…,
model.max_seq_length=…, training.batch_size=…, run.artifact=FILE, config=FILE.yaml; see train_llm.py --help."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Show where the time of a compiled train step goes, region by region."""

    steps: int = setting(3, "steps in the trace, behind three that warm up", at_least=1)
    kernels: int = setting(3, "largest kernels to name of each region", at_least=0)
    trace: str = setting("outputs/profile/trace.json", "where the trace goes, for Perfetto; NAME.json.gz is packed")


def read_settings(argv: Sequence[str]) -> tuple[ProfileOptions, TrainConfig]:
    """The profile's own settings and those of the step; UserError for a mistake, SystemExit after `--help`."""
    own: list[str] = []
    given: list[str] = []
    for argument in argv:
        (given if _is_of_step(argument.partition("=")[0]) else own).append(argument)
    options = parse_dataclass(ProfileOptions, own, program="profile_step.py", notes=lambda: NOTES)
    return options, parse(["command=run", *given])


def _is_of_step(path: str) -> bool:
    """Whether train_llm reads it. What has no section is the profile's: a mistyped name is looked for there."""
    return not path.startswith("-") and (
        "." in path or path.startswith("+") or path in {"config", *plugin_packages(TrainConfig)}
    )
