"""What `low_rank_rates.py` found, as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

COLOURS = {
    "svd": "#9db7d9",
    "asvd": "#e08e0b",
    "svd_llm": "#7b4fa3",
    "mimic": "#d1495b",
    "mimic_dense": "#2a9d4a",
    "mimic_gradient": "#134e3a",
    "dense": "#6b7280",
}
DENSE = ("dense", "", "")


@dataclass(frozen=True)
class Figures:
    """Perplexity on held-out text before and after the short training; None where it was not taken."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class Found:
    """A model's figures by (method, allocation, keep); those of the dense model itself are at DENSE."""

    methods: Sequence[str]
    allocations: Sequence[str]
    keeps: Sequence[str]
    figures: Mapping[tuple[str, str, str], Figures]

    def at(self, method: str, allocation: str, keep: str) -> Figures:
        return self.figures[method, allocation, keep]


def table(found: Found) -> str:
    """Markdown: a method and an allocation a row, the lowest figure of each column in bold; what mimic lost, below."""
    dense = found.at(*DENSE)
    heads = [f"keep {keep}{when}" for keep in found.keeps for when in (", before", ", after")]
    lines = [f"| method | allocation | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    cells: dict[tuple[str, str], list[float | None]] = {
        (method, allocation): [value for keep in found.keeps for value in astuple(found.at(method, allocation, keep))]
        for method in found.methods
        for allocation in found.allocations
    }
    columns = list(zip(*cells.values(), strict=True))
    lowest = [min((value for value in column if value is not None), default=None) for column in columns]
    for (method, allocation), values in cells.items():
        shown_values = [shown(value, value == low) for value, low in zip(values, lowest, strict=True)]
        lines.append(f"| {method} | {allocation} | {' | '.join(shown_values)} |")
    lines += ["", f"Dense: {shown(dense.before)}; after the same tuning: {shown(dense.after)}."]
    lost = []
    for head, low, column in zip(heads, lowest, columns, strict=True):
        winner = next((key for key, value in zip(cells, column, strict=True) if value == low and low is not None), None)
        if winner is not None and not winner[0].startswith("mimic"):
            lost.append(f"{head} ({' '.join(winner)})")
    return "\n".join(lines + ([f"Not lowest with mimic: {', '.join(lost)}."] if lost else []))


def shown(value: float | None, is_lowest: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:.2f}" if value < 1e4 else f"{value:.1e}"
    return f"**{text}**" if is_lowest else text


def picture(found: Found, path: Path) -> None:
    """Perplexity against the share kept, before and after."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for when, axes in zip(("before", "after"), panels, strict=True):
        for method in found.methods:
            for allocation in found.allocations:
                points = [(float(keep), getattr(found.at(method, allocation, keep), when)) for keep in found.keeps]
                points = [(keep, value) for keep, value in points if value is not None]
                if points:
                    style = "-" if allocation == "spectrum" else ":"
                    label = f"{method}, {allocation}"
                    axes.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[method], label=label)
        dense = getattr(found.at(*DENSE), when)
        if dense is not None:
            axes.axhline(dense, color=COLOURS["dense"], linewidth=1, label="dense")
        title = f"{when} the short training"
        axes.set(title=title, xlabel="share of the blocks' numbers kept", ylabel="held-out perplexity")
        seen = [value for line in axes.get_lines() for value in line.get_ydata()]
        axes.set_yscale("log" if seen and max(seen) > 3 * min(seen) else "linear")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
