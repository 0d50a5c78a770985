"""What TensorBoard itself reads from the event files."""

from pathlib import Path

import pytest

from apps.training.loggers.tensorboard_logger import TensorBoardLogger
from tests.apps.training.loggers.runs import a_run

pytest.importorskip("tensorboard")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_scalars_by_step_and_the_settings_as_text(tmp_path: Path) -> None:
    logger = TensorBoardLogger(a_run(tmp_path))
    logger.log(1, {"loss": 3.5, "lr": 0.25})
    logger.log(2, {"loss": 2.5})
    logger.close(failed=False)
    assert scalars(tmp_path) == {"loss": [(1, 3.5), (2, 2.5)], "lr": [(1, 0.25)]}
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"name: adamw" in file.read_bytes()
    assert b"house / first (abcd1234) small cpu" in file.read_bytes()


def test_a_resumed_run_takes_the_place_of_what_was_reported_behind_its_checkpoint(tmp_path: Path) -> None:
    for resumed, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        logger = TensorBoardLogger(a_run(tmp_path, resumed_step=resumed))
        for step in steps:
            logger.log(step, {"loss": step + resumed * 10.0})
        logger.close(failed=False)
    assert scalars(tmp_path) == {"loss": [(1, 1.0), (2, 12.0), (3, 13.0)]}


def test_another_run_in_the_same_folder_is_not_mixed_with_the_first(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        logger = TensorBoardLogger(a_run(tmp_path))
        logger.log(1, {"loss": value})
        logger.close(failed=False)
    assert scalars(tmp_path) == {"loss": [(1, 2.0)]}
