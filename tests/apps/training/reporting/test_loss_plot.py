"""loss.png is a picture with something on it."""

from pathlib import Path

import matplotlib.image
import pytest

from apps.training.reporting.loss_plot import write_loss_plot
from apps.training.reporting.records import Evaluation, StepRecord


@pytest.mark.parametrize("count", [1, 40])
def test_the_picture_can_be_read_back_and_shows_the_curve(tmp_path: Path, count: int) -> None:
    steps = [
        StepRecord(step=i, epoch=1, loss=9.0 / i, lr=1e-3, num_tokens=1, num_counted=1, seconds=1.0, grad_norm=None)
        for i in range(1, count + 1)
    ]
    path = tmp_path / "loss.png"
    write_loss_plot(path, steps, [Evaluation(count, 1.0, 10)], title="demo", unigram_entropy=6.0)
    picture = matplotlib.image.imread(path)
    assert picture.shape[0] > 300
    assert picture.std() > 0.05
    assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]
