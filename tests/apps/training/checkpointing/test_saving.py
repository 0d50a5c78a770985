"""After which steps a run saves, where its leg ends, and that the watch hears of a slow disk."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apps.training.checkpointing.manifest import newest_complete
from apps.training.checkpointing.reading import newest
from apps.training.checkpointing.saving import Resumed, Saver, open_resumed
from apps.training.checkpointing.writer import CheckpointWriter
from apps.training.config import parse
from apps.training.reporting.records import Evaluation
from apps.training.workers.group import Workers
from apps.training.workers.launch import Launch
from backends.errors import UserError
from tests.apps.training.checkpointing.toys import ToyModel, ToyProgram, records, save


@pytest.fixture
def make_saver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("apps.training.checkpointing.saving.static_files", lambda *_: {"config.json": b"{}"})

    def make(last_step: int, *settings: str, workers: Workers | None = None, resumed_step: int = 0) -> Saver:
        config = parse(["command=run", f"training.output_dir={tmp_path}", "checkpoint.save=true", *settings])
        model = ToyModel()
        saver = Saver(config, {"seed": 1}, model, ToyProgram(model), None, workers or Workers.solo(), last_step)
        saver.start(resumed_step)
        return saver

    return make


def train(saver: Saver, steps: int) -> None:
    outcome = SimpleNamespace(steps=[], evaluations=[], sums={}, last_step=0)
    for record in records(steps):
        saver.on_queued(record.step)
        outcome.steps.append(record)
        outcome.last_step = record.step
        saver.on_record(record.step, outcome)
    saver.on_end(outcome)
    saver.finish()


@pytest.mark.parametrize(
    ("settings", "taken", "expected"),
    [
        (["checkpoint.save_steps=3"], 8, {3, 6, 8}),
        (["checkpoint.save_steps=[1, 5]"], 8, {1, 5, 8}),
        (["checkpoint.save_steps=3"], 7, {3, 6, 7}),  # stopped before its end
        (["checkpoint.save_steps=3", "checkpoint.keep=2"], 8, {6, 8}),
    ],
)
def test_it_saves_after_the_steps_that_were_named_and_where_it_ends(
    make_saver: Any, tmp_path: Path, settings: list[str], taken: int, expected: set[int]
) -> None:
    train(make_saver(8, *settings), taken)
    assert {int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("iter_*")} == expected
    found = newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == max(expected)
    assert [record.step for record in found.records] == list(range(1, found.step + 1))


def test_the_watch_hears_that_a_slow_disk_is_being_written_to(make_saver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    workers = Workers.solo()
    monkeypatch.setattr(workers, "doing", heard.append)
    saver = make_saver(2, workers=workers)
    looks = iter([True, True, False])
    monkeypatch.setattr(type(saver._writer), "is_writing", property(lambda _: next(looks, False)))
    train(saver, 2)
    assert len(heard) == 2
    assert "checkpoint" in heard[0]


def test_a_leg_ends_with_the_run() -> None:
    assert Resumed(step=10).last_step(total=100, num_steps=None) == 100
    assert Resumed(step=10).last_step(total=100, num_steps=5) == 15
    assert Resumed(step=98).last_step(total=100, num_steps=5) == 100


def test_what_is_on_its_way_is_complete_once_it_has_settled(make_saver: Any, tmp_path: Path) -> None:
    """As when the loss of a later step is not finite: the process ends, and the last good checkpoint is there."""
    saver = make_saver(8, "checkpoint.save_steps=3")
    saver.on_queued(3)
    saver.on_record(3, SimpleNamespace(steps=records(3), evaluations=[], sums={}))
    saver.settle()
    found = newest(tmp_path / "checkpoints")
    assert found is not None
    assert found.step == 3


def test_a_run_that_is_stopped_with_weights_that_are_no_numbers_does_not_save_them(
    make_saver: Any, tmp_path: Path
) -> None:
    saver = make_saver(8, "checkpoint.save_steps=3", "checkpoint.keep=1")
    outcome = SimpleNamespace(steps=records(3), evaluations=[], sums={}, last_step=5)
    saver.on_queued(3)
    saver.on_record(3, outcome)
    with torch.no_grad():
        next(saver.model.parameters())[0] = torch.nan
    saver.on_end(outcome)
    with pytest.raises(UserError, match="The weights behind step 5 hold NaN or infinity, though its loss was finite"):
        saver.finish()
    assert newest_complete(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "iter_3"


@pytest.mark.parametrize(("overwrite", "left"), [("false", {2, 6}), ("true", {2})])
def test_a_later_checkpoint_that_is_damaged_is_removed_only_when_asked(
    make_saver: Any, tmp_path: Path, overwrite: str, left: set[int]
) -> None:
    folder = tmp_path / "checkpoints"
    save(folder, 2, 6)
    (folder / "iter_6" / "metrics.csv").write_text("")
    saver = make_saver(8, f"training.overwrite_output_dir={overwrite}", resumed_step=2)
    assert {int(path.name[5:]) for path in folder.iterdir()} == left
    train(saver, 6)
    assert newest_complete(folder) == folder / "iter_6"


def slow_down(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    real = CheckpointWriter._write_share

    def slow(self: CheckpointWriter, *given: Any) -> Any:
        time.sleep(0.3 if self.rank == rank else 0.0)
        return real(self, *given)

    monkeypatch.setattr(CheckpointWriter, "_write_share", slow)


def begin_step_3(saver: Saver) -> None:
    saver.on_queued(3)
    saver.on_record(3, SimpleNamespace(steps=records(3), evaluations=[], sums={}))


def test_an_error_waits_for_the_checkpoint_on_its_way_and_ctrl_c_does_not(
    make_saver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(monkeypatch, rank=0)
    saver = make_saver(8, "checkpoint.save_steps=3")
    begin_step_3(saver)
    with pytest.raises(KeyboardInterrupt), saver.settled_on_error():
        raise KeyboardInterrupt
    assert newest(tmp_path / "checkpoints") is None
    with pytest.raises(UserError, match="damaged"), saver.settled_on_error():
        raise UserError("a damaged row")
    assert newest(tmp_path / "checkpoints").step == 3


def test_a_worker_that_fails_waits_until_the_first_has_published(
    make_saver: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its failure ends the first worker too."""
    slow_down(monkeypatch, rank=0)
    first, second = (
        make_saver(8, "checkpoint.save_steps=3", workers=Workers(Launch(rank=rank, world_size=2))) for rank in (0, 1)
    )
    begin_step_3(first)
    begin_step_3(second)
    with pytest.raises(ZeroDivisionError), second.settled_on_error():
        raise ZeroDivisionError
    assert newest(tmp_path / "checkpoints").step == 3
    first.settle()


def test_a_late_evaluation_of_the_last_step_is_saved_with_it(make_saver: Any, tmp_path: Path) -> None:
    saver = make_saver(3, "checkpoint.save_steps=3")
    begin_step_3(saver)
    outcome = SimpleNamespace(steps=records(3), evaluations=[], sums={}, last_step=3)
    saver.on_end(outcome)
    outcome.evaluations.append(Evaluation(step=3, loss=2.0, num_counted=5))
    saver.on_end(outcome)
    assert newest(tmp_path / "checkpoints").evaluations == outcome.evaluations


def test_workers_that_found_different_checkpoints_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the listing of a network file system is old on one host."""
    config = parse(["command=run"])
    save(tmp_path, 2, 4, state={"run": {}})
    said: dict[int, str] = {}
    workers = Workers.solo()
    monkeypatch.setattr(workers, "broadcast_text", lambda text: said.setdefault(0, text))  # worker 0 is asked first
    assert open_resumed(tmp_path / "iter_4", {}, config, workers).step == 4
    workers.rank = 1
    assert open_resumed(tmp_path / "iter_4", {}, config, workers).step == 4
    with pytest.raises(UserError, match=r"Worker 1 found .*iter_2 \(.*\) to go on from, worker 0 found .*iter_4 \("):
        open_resumed(tmp_path / "iter_2", {}, config, workers)
    with pytest.raises(UserError, match=r"Worker 1 found no checkpoint to go on from, worker 0 found .*iter_4"):
        open_resumed(None, {}, config, workers)


@pytest.mark.parametrize(
    ("now", "told"),
    [(8, ""), (16, "the next have 16 rows .*: 32 rows are left out"), (6, "the last 8 rows come again")],
)
def test_other_rows_in_a_step_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], now: int, told: str) -> None:
    save(tmp_path, 4, state={"run": {"global_batch_size": 8}})
    config = parse(["command=run", "checkpoint.overwrite_config=true"])
    open_resumed(tmp_path / "iter_4", {"global_batch_size": now}, config, Workers.solo())
    error = capsys.readouterr().err
    assert re.search(told, error)
    assert bool(error) == bool(told)
