"""Lay the losses of runs over one another: against steps, tokens and seconds, as a PNG and a page.

    python apps/plot_runs.py outputs/runs/a outputs/runs/b
    python apps/plot_runs.py outputs/sweeps/lr output_dir=outputs/plots/lr     every run in a folder
    python apps/plot_runs.py --help

A run that is still going on is shown as far as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started as a file: make the repository importable from wherever we were started
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from apps.training.cli import run_main
from apps.training.config import parse_dataclass
from apps.training.config_schema import setting
from backends.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    """Lay the losses of runs over one another: plot_runs.py DIR [DIR ...] [key=value ...]."""

    output_dir: str = setting("outputs/plots", "where runs.png and runs.html go")
    title: str = setting("Training loss", "what is written above them")


def plot(argv: Sequence[str]) -> None:
    """Read the runs in the folders that `argv` names, write both files and print the table."""
    # A sweep names its runs "lr=0.1": what is there is a folder, whatever it is called.
    folders = [a for a in argv if Path(a).is_dir() or ("=" not in a and not a.startswith("-"))]
    settings = parse_dataclass(PlotSettings, [a for a in argv if a not in folders], program="plot_runs.py")
    if not folders:
        raise UserError("No run was named. Expected folders: python apps/plot_runs.py DIR [DIR ...].")

    from apps.plotting.pictures import COLUMNS, write_page, write_png
    from apps.plotting.runs import read_curves
    from apps.training.files import require_writable
    from apps.training.tables import text_table

    curves = read_curves(folders)
    if not curves:
        raise UserError(f"No step was taken yet in {', '.join(folders)}. Expected runs with at least one.")
    output = Path(settings.output_dir)
    require_writable(output, "output_dir")
    write_png(output / "runs.png", curves, title=settings.title)
    write_page(output / "runs.html", curves, title=settings.title, subtitle=", ".join(folders))
    print(text_table(COLUMNS, [curve.facts for curve in curves]))
    print(f"Pictures saved at {output}/runs.png, {output}/runs.html")


def main() -> int:
    """Entry point: exit code 2 and one line for a user's mistake."""
    return run_main(plot)


if __name__ == "__main__":
    sys.exit(main())
