"""Going on with a run: which checkpoint, with which settings, and is it the same run? Imports no torch.

The settings stored in the checkpoint are the base. What is given again has to be equal, for it decides the numbers;
free are only those that say where things go, how fast they go, and how far (`is_free`).
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.training.checkpointing.manifest import (
    FOLDER,
    MANIFEST,
    STATE,
    checkpoint_folders,
    complete_checkpoint,
    flaw,
    newest_complete,
)
from apps.training.config import given_paths, parse, to_mapping
from apps.training.config_rules import without_origins
from apps.training.config_schema import TrainConfig
from apps.training.tables import text_table
from backends.errors import UserError

if TYPE_CHECKING:
    from apps.training.workers.group import Workers

MODEL_NAMES = ("checkpoint.config_name", "checkpoint.model_name_or_path")
FREE_SECTIONS = ("checkpoint", "run", "logging")
FREE = {
    "command",
    "compile.output_dir",
    "compile.verbose",
    "compile.debug",
    "compile.workers",
    "lora.merge",
    "training.output_dir",
    "training.overwrite_output_dir",
    "training.resume",
    "training.worker_timeout",
    "training.reduce_dtype",
    "training.reduce_bucket_mb",
    "training.reduce_by",
    "training.shard_optimizer",
    "training.evaluate",
    "training.eval_steps",
    "training.gradient_accumulation_steps",  # follows from the global batch, which `require_same_run` compares
}
# They tell of one start of the program, and are not taken over by the next.
OF_ONE_START = (
    "command",
    "checkpoint.load",
    "checkpoint.load_path",
    "checkpoint.num_steps",
    "checkpoint.overwrite_config",
    "training.overwrite_output_dir",
    "training.resume",
    "training.worker_timeout",
)
NEVER_OTHERS = ("model", "optimizer", "precision", "lora")


def save_folder(config: TrainConfig) -> Path:
    """Where a run's checkpoints lie."""
    given = config.checkpoint.save_path
    return Path(config.training.output_dir, FOLDER) if given is None else Path(given)


def resumed_settings(argv: Sequence[str], config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """The settings to go on with and the checkpoint, every byte of it checked; `config` and None when there is none.

    training.resume=auto takes the newest complete checkpoint of this run's own folder and may find none;
    checkpoint.load=true has to find one. Raises UserError with a table of the settings given in `argv` that differ from
    the stored ones, unless checkpoint.overwrite_config=true, which lets them replace the stored ones.
    """
    path = _chosen(config)
    if path is None:
        return config, None
    state = _state_of(path)
    stored = _without(state["settings"], OF_ONE_START)
    resumed = parse(argv, base=stored, base_name=str(path))
    given = given_paths(argv)
    if not config.checkpoint.overwrite_config:
        now, then = (_flat(without_origins(settings)) for settings in (to_mapping(resumed), state["settings"]))
        _require_equal(path, given, now, then)
    return _with_global_batch(resumed, given, state), path


def require_same_run(
    state: Mapping[str, Any], run_now: Mapping[str, Any], *, path: Path, overwrite_config: bool = False
) -> None:
    """UserError with a table when the checkpoint's `state["run"]` is another run than `run_now`.

    Both hold model, optimizer, precision and lora, which never may differ, and seed, dataset, global_batch_size …,
    which may with `overwrite_config`: mappings and plain values.
    """
    stored, now = _flat(state["run"]), _flat(json.loads(json.dumps(dict(run_now))))
    names = [name for name in {**stored, **now} if stored.get(name, "–") != now.get(name, "–")]
    if overwrite_config:
        names = [name for name in names if name.partition(".")[0] in NEVER_OTHERS]
    if names:
        table = [(name, stored.get(name, "–"), now.get(name, "–")) for name in names]
        fix = "Use the settings it was written with"
        if not any(name.partition(".")[0] in NEVER_OTHERS for name in names):
            fix += ", or go on with others by checkpoint.overwrite_config=true"
        raise UserError(
            f"The checkpoint {path} is of another run. {fix}:\n{text_table(('field', 'checkpoint', 'this run'), table)}"
        )


def require_same_choice(path: Path | None, workers: Workers) -> None:
    """UserError when this worker found another checkpoint than worker 0. Every worker calls it.

    Each looked for itself, and the file system of its host may have shown it less than the others'.
    """
    digest = "" if path is None else hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()[:12]
    mine = "no checkpoint" if path is None else f"{path} ({MANIFEST}: {digest})"
    first_digest, _, first = workers.broadcast_text(f"{digest} {mine}").partition(" ")
    if digest != first_digest:
        raise UserError(
            f"Worker {workers.rank} found {mine} to go on from, worker 0 found {first}. "
            "Expected the same on every host; start again when the file system shows all of them the same files."
        )


def tell_other_rows(state: Mapping[str, Any], run_now: Mapping[str, Any], step: int) -> None:
    """With checkpoint.overwrite_config=true steps may have other rows: where they go on is counted in steps."""
    before, now = state["run"].get("global_batch_size"), run_now.get("global_batch_size")
    if before != now:
        rows = step * abs(now - before)
        what = f"{rows:,} rows are left out" if now > before else f"the last {rows:,} rows come again"
        print(
            f"warning: {step} steps of {before} rows were taken, the next have {now} rows and go on behind as many of "
            f"their own size: {what}.",
            file=sys.stderr,
            flush=True,
        )


def is_free(path: str) -> bool:
    """Whether the setting may be given otherwise than it is stored: it does not decide the numbers."""
    return path not in MODEL_NAMES and (path in FREE or path.partition(".")[0] in FREE_SECTIONS)


def _chosen(config: TrainConfig) -> Path | None:
    own = save_folder(config)
    found = newest_complete(own) if config.training.resume == "auto" else None
    if found is None and config.training.resume == "auto" and not config.training.overwrite_output_dir:
        _require_none(own)
    if found is not None or not config.checkpoint.load:
        return found
    load_path = config.checkpoint.load_path
    return complete_checkpoint(own if load_path is None else Path(load_path))


def _require_none(folder: Path) -> None:
    """UserError when all that a run has saved in `folder` is damaged: to start anew is not to be done unasked."""
    damaged = checkpoint_folders(folder)
    if damaged:
        raise UserError(
            f"Of the checkpoints in {folder} none is complete, {damaged[0].name} for one: {flaw(damaged[0])} "
            f"Put back what it lacks, or start anew by moving {folder} away or by training.overwrite_output_dir=true."
        )


def _require_equal(path: Path, given: Sequence[str], now: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    names = [name for name in {**stored, **now} if any(_is_part(name, of) for of in given if not is_free(of))]
    differ = [name for name in names if now.get(name) != stored.get(name)]
    if differ:
        table = [(name, stored.get(name), now.get(name)) for name in differ]
        raise UserError(
            f"Settings given here are not those stored in {path}. Leave them out, or replace the stored ones with "
            f"checkpoint.overwrite_config=true:\n{text_table(('setting', 'checkpoint', 'given'), table)}"
        )


def _is_part(name: str, setting: str) -> bool:
    """Whether the flat `name` is the setting, one that `+key` had added, or an entry of its value."""
    return f"{name}.".startswith((f"{setting}.", f"extra.{setting}."))


def _with_global_batch(config: TrainConfig, given: Sequence[str], state: Mapping[str, Any]) -> TrainConfig:
    """The stored number of rows in a step, for any number of workers: accumulation follows, unless another is given.

    With checkpoint.overwrite_config=true what is given decides.
    """
    training = config.training
    if "training.gradient_accumulation_steps" not in given or _is_of_first_start(config, given, state):
        training = replace(training, gradient_accumulation_steps=1)
    elif config.checkpoint.overwrite_config and "training.global_batch_size" not in given:
        return replace(config, training=replace(training, global_batch_size=None))
    if "training.global_batch_size" not in given:
        training = replace(training, global_batch_size=state["run"]["global_batch_size"])
    return replace(config, training=training)


def _is_of_first_start(config: TrainConfig, given: Sequence[str], state: Mapping[str, Any]) -> bool:
    """Whether accumulation is given as before, for as many workers as there were then, and not to change anything."""
    if config.checkpoint.overwrite_config or "training.global_batch_size" in given:
        return False
    stored = state["settings"]["training"]
    followed = stored["gradient_accumulation_steps"] == 1 and stored["global_batch_size"] is not None
    return followed or stored["gradient_accumulation_steps"] == config.training.gradient_accumulation_steps


def _without(settings: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    kept = deepcopy(dict(settings))
    for path in paths:
        section, _, key = path.rpartition(".")
        (kept[section] if section else kept).pop(key, None)
    return kept


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = item
    return flat


def run_folders(config: TrainConfig) -> dict[str, Path]:
    """The folders a run writes to, by the setting that names them."""
    folders = {"training.output_dir": Path(config.training.output_dir)}
    return folders | ({"checkpoint.save_path": save_folder(config)} if config.checkpoint.save else {})


def goes_on_in_place(config: TrainConfig, checkpoint: Path | None) -> bool:
    """Whether the output folder holds the run of `checkpoint`, up to where it was ended.

    The checkpoint is this run's own, and its run wrote there: it names the folder, or lies in it (moved with it).
    """
    own, output = save_folder(config).resolve(), Path(config.training.output_dir).resolve()
    if checkpoint is None or checkpoint.parent.resolve() != own:
        return False
    written = Path(_state_of(checkpoint)["settings"]["training"]["output_dir"])
    return own.is_relative_to(output) or written.resolve() == output


def _state_of(checkpoint: Path) -> dict[str, Any]:
    """What the run wrote of itself: its settings, and what makes it this run."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["state"]
    return state
