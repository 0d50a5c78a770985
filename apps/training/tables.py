"""A table a user reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

WIDTH = 60  # of a cell


def text_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lines of cells under a head, two blanks before each; long cells are cut."""
    lines = [list(head), *([_short(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
