"""The lines of a compression's passes: one after another, and none left up."""

import pytest

from apps.compression.passes import Passes
from apps.training.progress import CLEAR
from apps.training.workers.group import Workers


def test_each_pass_has_a_line_of_its_own_and_the_watch_hears_of_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers, heard = Workers.solo(), []
    monkeypatch.setattr(workers, "doing", heard.append)
    monkeypatch.setattr("apps.training.progress.LIVE_INTERVAL", 0.0)
    with Passes(workers, "on") as passes:
        for done in range(3):
            passes("taking gradients", "batches", done, 2)
        passes("taking spectra", "blocks", 0, 5)
        passes("taking spectra", "blocks", 1, 5)  # and a mistake ends it here
    shown = [line.split("  ") for line in capsys.readouterr().err.split(CLEAR) if line]
    assert [line[0] for line in shown] == [
        "Taking gradients 0/2 batches",
        "Taking gradients 1/2 batches",
        "Taking gradients 2/2 batches",
        "Taking spectra 0/5 blocks",
        "Taking spectra 1/5 blocks",
    ]
    assert all(any(part.startswith("ETA ") for part in line) for line in shown)
    assert heard == [
        *(f"taking gradients, {done} of 2 batches done" for done in range(3)),
        *(f"taking spectra, {done} of 5 blocks done" for done in range(2)),
    ]
