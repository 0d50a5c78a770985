"""A runner that writes what a run leaves, without training, and remembers what it was asked for."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from apps.training.reporting.output_folder import COLUMNS


def write_run(folder: Path, losses: Sequence[float], *, steps: int | None = None, dev_loss: float | None = 2.0) -> None:
    """A folder as a run leaves it that took the steps of `losses` of `steps`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "per_step_metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step, loss in enumerate(losses, start=1):
            writer.writerow([100, loss, 1e-3, 0.5, step, 1, 99, "", 200.0])
    evaluation = "" if dev_loss is None else f"Evaluation loss: {dev_loss:.4f}, Perplexity: 7.3891\n"
    count = f"{len(losses) if steps is None else steps:,}"
    (folder / "summary.txt").write_text(f"Per worker number of batches (steps): {count}\n{evaluation}")
    (folder / "report.html").write_text("report")


class FakeRunner:
    """Calls `behave` for each run (its settings by name, what hears its lines) and returns the exit code it gives."""

    def __init__(self, behave: Callable[[dict[str, str], Callable[[str], None]], int] | None = None) -> None:
        self.behave = behave
        self.compiled: list[dict[str, str]] = []
        self.ran: list[dict[str, str]] = []
        self.words: list[list[str]] = []

    def __call__(
        self, words: Sequence[str], log: Path, *, on_line: Callable[[str], None], stop: Callable[[], bool]
    ) -> int:
        self.words.append(list(words))
        settings = dict(word.partition("=")[::2] for word in words if "=" in word)
        if settings["command"] == "compile":
            self.compiled.append(settings)
            return 0
        self.ran.append(settings)
        if self.behave is not None:
            return self.behave(settings, on_line)
        folder = Path(settings["training.output_dir"])
        write_run(folder, [3.0, 2.5], dev_loss=float(settings.get("optimizer.lr", "1")) + 2)
        return 0
