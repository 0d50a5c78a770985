"""Every setting of a compression (`python apps/compress_llm.py --help` prints them). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from apps.training.config_schema import setting
from backends.errors import UserError


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    model_name_or_path: str = setting(help="folder with the model")


@dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    method: Literal["svd", "asvd", "svd_llm", "mimic", "mimic_gd"] = setting(
        "mimic", "mimic: least error of the outputs, in closed form; mimic_gd: learned; see docs/low-rank.md"
    )
    keep: float | None = setting(None, "share of the layers' numbers to keep, above 0, at most 1")
    ranks: Any = setting(None, "rank by layer name, its end or a glob: '{q_proj: 384, o_proj: 384}'")
    allocation: Literal["uniform", "spectrum"] = setting(
        "uniform", "of keep: the same share of each layer, or where it spares the residual stream most"
    )
    match: list[str] | None = setting(None, "layers by name, end of name or glob; null: all linears of the blocks")
    inputs: Literal["compressed", "dense"] = setting(
        "compressed", "what a layer's inputs come out of: its compressed predecessors, or the dense ones"
    )
    targets: Literal["own", "dense"] = setting(
        "own", "of mimic, what a layer is to give: what its weights give of its own inputs, or of the dense model's"
    )
    weighting: Literal["equal", "gradient"] = setting(
        "equal", "of mimic, what an output's error counts: all alike, or by the loss's gradients there"
    )
    epochs: int = setting(1, "of mimic_gd: passes over the calibration data", at_least=1)
    lr: float = setting(8.6e-5, "of mimic_gd: AdamW's learning rate", above=0)
    max_grad_norm: float = setting(2.0, "of mimic_gd: a layer's gradients are clipped to this norm", above=0)
    calibration: str | None = setting(None, "dataset folder; null: the embedded corpus, prepared when missing")
    tokens: int = setting(65536, "train tokens of it to take moments over, at most all", at_least=1)


@dataclass(frozen=True, kw_only=True)
class CompressSettings:
    """Compress a model's linear layers to two thin matrices each, or multiply them back (expand=true)."""

    checkpoint: CheckpointSettings
    compress: CompressionSettings = field(default_factory=CompressionSettings)
    output_dir: str = setting(help="a new folder, for the compressed model and the report")
    expand: bool = setting(False, "multiply the factors of a compressed model back into plain weights; short: --expand")
    max_seq_length: int = setting(256, "tokens of a row of the calibration data", at_least=1)
    batch_size: int = setting(8, "rows of a batch", at_least=1)
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = setting("auto", "auto: the dtype of the model's weights")
    evaluate: bool = setting(True, "take the perplexity of the dev split before and after")
    seed: int = setting(42, "seed of the order of the rows", at_least=0, at_most=2**64 - 1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is a GPU")
    worker_timeout: float = setting(1800.0, "seconds without progress of a worker that end the job", above=0)
    progress: Literal["auto", "on", "off"] = setting("auto", "live progress line; auto: on a terminal")

    def __post_init__(self) -> None:
        keep, ranks = self.compress.keep, self.compress.ranks
        if not self.expand and (keep is None) == (ranks is None):
            raise UserError(
                "Please specify exactly one of compress.keep and compress.ranks; got "
                f"compress.keep={keep} and compress.ranks={ranks}."
            )
        if keep is not None and not 0 < keep <= 1:
            raise UserError(
                f"compress.keep={keep:g}. Expected the share of the layers' numbers to keep: above 0, at most 1."
            )
        if ranks is not None:
            _check_ranks(ranks)
            _check_nothing_beside_ranks(self.compress)
        if self.compress.targets == "dense":
            _check_dense_targets(self.compress)
        if self.compress.weighting == "gradient" and self.compress.method != "mimic":
            raise UserError(
                f"compress.weighting=gradient is of compress.method=mimic, got compress.method={self.compress.method}. "
                "Choose mimic, or leave compress.weighting out."
            )
        if self.compress.method == "mimic_gd" and self.compress.inputs == "compressed":
            raise UserError(
                "compress.method=mimic_gd learns beside the dense model, got compress.inputs=compressed. "
                "Add compress.inputs=dense."
            )


def _check_dense_targets(compress: CompressionSettings) -> None:
    if compress.method != "mimic":
        raise UserError(
            f"compress.targets=dense is of compress.method=mimic, got compress.method={compress.method}. "
            "Choose mimic, or leave compress.targets out."
        )
    if compress.inputs != "compressed":
        raise UserError(
            f"compress.targets=dense repairs what compressed predecessors give, got compress.inputs={compress.inputs}. "
            "Expected compress.inputs=compressed."
        )


def _check_nothing_beside_ranks(compress: CompressionSettings) -> None:
    given = {"match": compress.match is not None, "allocation": compress.allocation != "uniform"}
    for name in (name for name, is_given in given.items() if is_given):
        raise UserError(
            f"compress.ranks names the layers and says their ranks, got compress.{name}={getattr(compress, name)} too. "
            "Leave one of them out."
        )


def _check_ranks(ranks: Any) -> None:
    plain = isinstance(ranks, dict) and all(isinstance(name, str) for name in ranks)
    if not plain or not ranks or any(isinstance(rank, bool) or not isinstance(rank, int) for rank in ranks.values()):
        raise UserError(f"compress.ranks={ranks}. Expected a rank for each name of a layer: '{{q_proj: 384}}'.")
