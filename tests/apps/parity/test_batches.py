"""Which rows are measured on."""

from pathlib import Path

import torch

from apps.parity.batches import Batches, find_dataset
from tests.apps.parity.known_errors import settings_for


def opened(dataset: Path, model: Path, **changes: object) -> Batches:
    settings = settings_for(dataset, model, **changes)
    return Batches(find_dataset(settings, 300), settings, torch.device("cpu"))


def test_layers_are_measured_on_rows_that_calibration_has_not_seen(tiny_dataset: Path, tiny_model: Path) -> None:
    batches = opened(tiny_dataset, tiny_model, num_batches=3)
    seen = {tuple(row.tolist()) for batch in batches.calibration() for row in batch["input_ids"]}
    measured = [tuple(row.tolist()) for batch in batches.measured() for row in batch["input_ids"]]
    assert (len(seen), len(measured)) == (6, 9)
    assert not seen & set(measured)
    again = opened(tiny_dataset, tiny_model, num_batches=3)
    assert [tuple(row.tolist()) for batch in again.measured() for row in batch["input_ids"]] == measured
    other = opened(tiny_dataset, tiny_model, num_batches=3, seed=7)
    assert [tuple(row.tolist()) for batch in other.measured() for row in batch["input_ids"]] != measured


def test_each_dev_row_comes_once_and_the_last_batch_is_padded(tiny_dataset: Path, tiny_model: Path) -> None:
    batches = opened(tiny_dataset, tiny_model)
    found = list(batches.dev())
    rows = batches.dataset.num_dev_rows
    assert len(found) == batches.num_dev == -(-rows // 3)
    assert all(batch["input_ids"].shape == (3, 32) for batch, _ in found)
    counted = sum((batch["grad_scale"] > 0).any(1).sum().item() for batch, _ in found)
    assert counted == rows
    assert f"{rows} dev rows" in batches.description()
    fewer = opened(tiny_dataset, tiny_model, eval_batches=2)
    assert len(list(fewer.dev())) == 2
    assert "the first 6 dev rows" in fewer.description()
