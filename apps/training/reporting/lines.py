"""The lines a run prints: overview, one line a step, evaluation. The wording is what users' scripts look for."""

from __future__ import annotations

import sys
from pathlib import Path

from apps.training.config_schema import LoraConfig, TrainConfig
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.steps import Position, StepCount


def tell_unread(config: TrainConfig, checkpoint: Path | None) -> None:
    """A line on the error stream for each setting that looks as if it were used, and is not.

    `checkpoint` is what the run goes on from. No error: a run's config.yaml may hold such settings as well.
    """
    source, lora = config.checkpoint, config.lora
    if source.load_path is not None and not source.load and checkpoint is None:
        _warn(
            f"checkpoint.load_path={source.load_path} is not read: checkpoint.load=false. "
            "Add checkpoint.load=true to go on from it."
        )
    if lora.alpha != LoraConfig().alpha and lora.r == 0 and lora.adapter is None:
        _warn(f"lora.alpha={lora.alpha:g} is not read: lora.r=0 trains all weights. Set lora.r too to train updates.")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def overview(count: StepCount, *, batch_size: int, workers: int = 1) -> str:
    """The block before the first step; what its steps follow from comes first, if they were given as tokens."""
    return "\n".join(
        [
            *([str(count.budget)] if count.budget else []),
            f"Number of epochs: {count.num_epochs:,}",
            f"Per worker batch size: {batch_size:,}",
            f"Per worker number of batches (steps): {count.total:,}",
            f"Number of DP workers: {workers:,}",
        ]
    )


def step_line(record: StepRecord, position: Position, workers: int = 1) -> str:
    """`Epoch [1/1], Step [1/2622], Loss: 11.1906, LR: 1e-05, Num tokens this step: 2691`, workers in front."""
    several = f"DP: {workers}-way, " if workers > 1 else ""
    return (
        f"{several}Epoch [{position.epoch}/{position.epochs}], Step [{position.step}/{position.steps}], "
        f"Loss: {record.loss:.4f}, LR: {record.lr:.4g}, Num tokens this step: {record.num_tokens}"
        + ("" if record.objective is None else f", Objective: {record.objective:.4f}")
        + (", Update skipped: not finite" if record.skipped else "")
    )


def evaluation_line(evaluation: Evaluation) -> str:
    return f"Evaluation loss: {evaluation.loss:.4f}, Perplexity: {evaluation.perplexity:.4f}"


def unigram_line(entropy: float) -> str:
    """What to compare the loss with: a model that knows how often each token comes, and nothing else."""
    return f"Unigram entropy of the dataset: {entropy:.4f}"


def settings_text(name: str, settings: object) -> str:
    """A plugin with its settings: `adamw (lr 0.001, weight_decay 0.1)`."""
    spelled = {key: "null" if value is None else value for key, value in vars(settings).items()}
    values = ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in spelled.items()
    )
    return f"{name} ({values})" if values else name


def short(number: float) -> str:
    """`812`, `12.3k`, `1.24M`, `70.6B`: three digits."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.9995:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
