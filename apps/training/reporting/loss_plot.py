"""loss.png: the loss of every step, its running mean, the evaluations and the corpus' unigram entropy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apps.training.files import atomic_path
from apps.training.reporting.records import Evaluation, StepRecord
from apps.training.reporting.svg_chart import running_mean


def write_loss_plot(
    path: Path,
    steps: Sequence[StepRecord],
    evaluations: Sequence[Evaluation],
    *,
    title: str,
    unigram_entropy: float | None = None,
) -> None:
    """Write the picture to `path`. `unigram_entropy` in nats a token: what a model knowing only frequencies reaches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    numbers, losses = [record.step for record in steps], [record.loss for record in steps]
    axes.plot(numbers, losses, color="#9db7d9", linewidth=0.8, label="each step")
    axes.plot(numbers, running_mean(losses), color="#1f5fa8", linewidth=2, label="running mean")
    if evaluations:
        places = [evaluation.step for evaluation in evaluations], [evaluation.loss for evaluation in evaluations]
        axes.plot(*places, "o", color="#d1495b", markersize=6, zorder=3, label="evaluation")
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color="#6b7280", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))
