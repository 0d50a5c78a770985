"""compress.method=mimic_gd: factors that learn beside the dense model; their losses on the screen and in a file."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from apps.compression.settings import CompressSettings
from apps.training.files import atomic_path
from apps.training.progress import Progress
from modelzoo.compression import Factors, learn_factors, start_of_learning

LOSSES, WINDOW = "mimic_losses.csv", 8


class Learning:
    """What `compress_model` takes as `learned`; `losses` by layer afterwards, a mean over each `WINDOW` batches."""

    def __init__(self, model: nn.Module, batches: Sequence[Mapping[str, Any]], settings: CompressSettings) -> None:
        self.model, self.batches, self.settings = model, batches, settings
        self.losses: dict[str, list[float]] = {}

    def __call__(self, layers: Mapping[str, nn.Linear], ranks: Mapping[str, int]) -> dict[str, Factors]:
        """The factors of all layers, after `compress.epochs` passes."""
        chosen = self.settings.compress
        start = {name: start_of_learning(layers[name].weight, layers[name].bias, rank) for name, rank in ranks.items()}
        total = chosen.epochs * len(self.batches)
        with Progress(total, "Mimicking", "batches", mode=self.settings.progress) as progress:

            def tell(number: int, losses: dict[str, float]) -> None:
                worst = max(losses, key=lambda name: losses[name])
                progress.write(
                    f"Batch [{number}/{total}], Mean loss: {mean(losses.values()):.4g}, "
                    f"Largest: {losses[worst]:.4g} ({worst})"
                )

            def counted() -> Any:
                for batch in chain.from_iterable(repeat(self.batches, chosen.epochs)):
                    yield batch
                    progress.update()

            learn = functools.partial(learn_factors, lr=chosen.lr, clip=chosen.max_grad_norm, window=WINDOW)
            factors, self.losses = learn(
                self.model, {name: layers[name] for name in ranks}, start, counted(), on_window=tell
            )
        return factors

    def save(self, folder: Path) -> None:
        """mimic_losses.csv: a row for each window, a column for each layer."""
        with atomic_path(folder / LOSSES) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("batch", *self.losses))
            for index, row in enumerate(zip(*self.losses.values(), strict=True), start=1):
                writer.writerow((min(index * WINDOW, self.settings.compress.epochs * len(self.batches)), *row))
