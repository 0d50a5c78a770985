"""Every setting of a comparison (`python apps/compare_backends.py --help` prints them). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from apps.training.config_schema import ModelConfig, setting
from backends.errors import UserError
from backends.precision import PrecisionPolicy, resolve


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    config_name: str | None = setting(None, "named model or folder with config.json; random weights")
    model_name_or_path: str | None = setting(None, "folder with weights")


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """Compare backends on one model and one dataset: errors of every layer, logits, perplexity, time, energy."""

    backends: list[Any] = setting(
        factory=lambda: ["dense"],
        help="the first is the reference: [dense, optical, {use: optical, q_levels: 8}, {rules: [{match: …, use: …}]}]",
    )
    targets: list[Any] = setting(
        factory=list,
        help="compare these instead, on one train step; the first is the reference: [eager, inductor, mlir]",
    )
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: str | None = setting(None, "dataset folder; null: the embedded corpus, prepared when missing")
    batch_size: int = setting(4, "rows of a batch", at_least=1)
    calibrate_batches: int = setting(
        8, "train batches that backends with statistics see before anything is measured", at_least=0
    )
    num_batches: int = setting(4, "train batches, after those, that the layers' errors are taken over", at_least=1)
    eval_batches: int | None = setting(None, "dev batches for logits and perplexity; null: all", at_least=1)
    timing_rounds: int = setting(5, "times each backend is timed, in turns; the median counts", at_least=1)
    seed: int = setting(42, "seed of the random weights and of the order of the rows", at_least=0, at_most=2**64 - 1)
    output_dir: str = setting("outputs/parity", "where parity.csv, parity.png and parity.html go")
    overwrite: bool = setting(False, "replace a report found in output_dir")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is a GPU")
    progress: Literal["auto", "on", "off"] = setting("auto", "live progress line; auto: on a terminal")

    def __post_init__(self) -> None:
        names = self.checkpoint
        if (names.config_name is None) == (names.model_name_or_path is None):
            raise UserError(
                "Please specify exactly one of checkpoint.config_name or checkpoint.model_name_or_path; got "
                f"checkpoint.config_name={names.config_name} and "
                f"checkpoint.model_name_or_path={names.model_name_or_path}."
            )
        assert self.precision  # refuses dtypes that do not go together

    @property
    def precision(self) -> PrecisionPolicy:
        """The dtype of everything, every `auto` filled in."""
        return resolve(
            self.model.dtype,
            compute=self.model.compute_dtype,
            norms=self.model.norm_dtype,
            residual=self.model.residual_dtype,
            logits=self.model.logits_dtype,
        )
