"""Who may write where, and the CSV of the steps."""

import csv
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from apps.training.reporting.output_folder import COLUMNS, MetricsFile, require_free, require_room, start_run
from apps.training.reporting.records import StepRecord
from backends.errors import UserError


def test_checking_a_new_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    require_free(tmp_path / "runs" / "new", overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["summary.txt", "config.json", "model-00001-of-00002.safetensors"])
def test_another_run_or_checkpoint_needs_permission(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=rf"holds another run \({name}\).*training\.overwrite_output_dir=true"):
        require_free(tmp_path, overwrite=False)
    require_free(tmp_path, overwrite=True)


def test_other_peoples_files_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    require_free(tmp_path, overwrite=False)


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        require_free(tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"Cannot write training\.output_dir="):
        require_free(tmp_path / "file" / "below", overwrite=True)
    with pytest.raises(UserError, match=r"Cannot write training\.output_dir=/proc/nothing"):
        require_free(Path("/proc/nothing"), overwrite=True)


def test_a_checkpoint_without_room_is_refused_before_the_first_step(tmp_path: Path) -> None:
    require_room(tmp_path / "new" / "run", 1000)
    with pytest.raises(UserError, match=r"takes about [\d,.]+ GiB, the disk of training\.output_dir=.* free"):
        require_room(tmp_path / "new" / "run", 2**60)
    assert list(tmp_path.iterdir()) == []


def test_starting_over_removes_stale_reports_but_not_the_checkpoint(tmp_path: Path) -> None:
    for name in ("summary.txt", "report.html", "model.safetensors", "mine.txt"):
        (tmp_path / name).write_text("old")
    start_run(tmp_path, "command: run\n")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "model.safetensors", "mine.txt"}
    assert (tmp_path / "config.yaml").read_text() == "command: run\n"


def test_each_step_is_in_the_csv_at_once_as_plain_numbers(tmp_path: Path) -> None:
    record = StepRecord(
        step=1, epoch=1, loss=5.123456789, lr=1e-5, num_tokens=2691, num_counted=2600, seconds=0.5, grad_norm=None
    )
    with MetricsFile(tmp_path / "metrics.csv") as metrics:
        metrics.append(record)
        with (tmp_path / "metrics.csv").open(newline="") as file:  # not closed yet: a crash now would lose nothing
            header, row = csv.reader(file)
    assert header == list(COLUMNS)
    assert header[:4] == ["Tokens in Step", "Step Loss", "Learning Rate", "Time per Step"]
    assert row == ["2691", "5.123456789", "1e-05", "0.5", "1", "1", "2600", "", "5382.0", "", "0"]


def rows_of(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return [row["Step"] for row in csv.DictReader(file)]


def test_a_resumed_csv_has_the_same_rows_no_gap_and_no_duplicate(tmp_path: Path) -> None:
    """The run was killed after step 5, in the middle of a row; it goes on after step 3."""
    records = [
        StepRecord(
            step=step, epoch=1, loss=1 / step, lr=0.1, num_tokens=10, num_counted=9, seconds=1 / 3, grad_norm=1 / 7
        )
        for step in range(1, 6)
    ]
    path = tmp_path / "metrics.csv"
    with MetricsFile(path) as metrics:
        for record in records:
            metrics.append(record)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with MetricsFile(path, records[:3]) as metrics:
        assert rows_of(path) == ["1", "2", "3"]
        for record in records[3:]:
            metrics.append(record)
    assert path.read_bytes() == whole


def test_a_run_killed_before_it_left_weights_may_start_again(tmp_path: Path) -> None:
    (tmp_path / "per_step_metrics.csv").touch()
    require_free(tmp_path, overwrite=False, unfinished=True)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="holds another run"):
        require_free(tmp_path, overwrite=False, unfinished=True)


def test_a_run_with_checkpoints_is_first_of_all_one_to_go_on_with(tmp_path: Path) -> None:
    """To replace it would remove its checkpoints."""
    (tmp_path / "per_step_metrics.csv").touch()
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(UserError, match=r"\. Choose another folder, or replace it"):
        require_free(tmp_path, overwrite=False, checkpoints=checkpoints)
    (checkpoints / "iter_20").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"\. Go on with it by training\.resume=auto: .* the run and its checkpoints with"
    ):
        require_free(tmp_path, overwrite=False, checkpoints=checkpoints)


def make_records(count: int) -> list[StepRecord]:
    return [
        StepRecord(step=step, epoch=1, loss=1 / step, lr=0.1, num_tokens=10, num_counted=9, seconds=1 / 3, grad_norm=1)
        for step in range(1, count + 1)
    ]


@contextmanager
def room_for(nbytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a disk that is full: what fits of a write is written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_rows_without_room_wait_and_come_without_gap_or_half_a_row(tmp_path: Path) -> None:
    records, path = make_records(6), tmp_path / "metrics.csv"
    with MetricsFile(tmp_path / "whole.csv") as metrics:
        for record in records:
            metrics.append(record)
    with MetricsFile(path, records[:1]) as metrics:
        metrics.append(records[1])
        assert metrics.complaint() is None
        before = path.read_bytes()
        with room_for(len(before) + 5):
            for record in records[2:5]:
                metrics.append(record)
                assert path.read_bytes() == before
        assert "The run goes on" in str(metrics.complaint())
        assert metrics.complaint() is None
        metrics.append(records[5])
    assert path.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert metrics.complaint() is None


def test_rows_that_found_no_room_till_the_end_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    with room_for(path.stat().st_size + 5):
        for record in make_records(2):
            metrics.append(record)
        metrics.close()
    assert "lacks its last 2 rows" in str(metrics.complaint())
    assert rows_of(path) == []
