"""Two runs and one folder."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apps.training.lock import LOCK, locked
from backends.errors import UserError

HOLD = "import sys\nfrom pathlib import Path\nfrom apps.training.lock import locked\n" + (
    "with locked({'training.output_dir': Path(sys.argv[1])}):\n    print('held', flush=True)\n    sys.stdin.read()\n"
)


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_run_is_told_who_is_there_until_the_first_ends(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as first:
        message = (
            rf"checkpoint.save_path=.*run is in use by another run \(process {first.pid} on {socket.gethostname()}\)"
        )
        with pytest.raises(UserError, match=message), locked({"checkpoint.save_path": tmp_path / "run"}):
            pass
        first.communicate("")
    with locked({"checkpoint.save_path": tmp_path / "run"}):
        assert (tmp_path / "run" / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_a_killed_run_holds_nothing(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (tmp_path / LOCK).exists()  # left behind, and no obstacle
    with locked({"training.output_dir": tmp_path}):
        pass
    assert not (tmp_path / LOCK).exists()


def test_one_folder_under_two_settings_is_held_once(tmp_path: Path) -> None:
    with locked({"training.output_dir": tmp_path / "a", "checkpoint.save_path": tmp_path / "b" / ".." / "a"}):
        assert (tmp_path / "a" / LOCK).exists()


def test_nothing_is_left_of_a_run_that_wrote_nothing(tmp_path: Path) -> None:
    with locked({"training.output_dir": tmp_path / "runs" / "new"}):
        assert (tmp_path / "runs" / "new").is_dir()
    assert not (tmp_path / "runs").exists()


def test_when_the_second_folder_is_taken_the_first_is_given_back(tmp_path: Path) -> None:
    with locked({"training.output_dir": tmp_path / "taken"}):
        both = {"training.output_dir": tmp_path / "free", "checkpoint.save_path": tmp_path / "taken"}
        with pytest.raises(UserError, match="is in use"), locked(both):
            pass
        assert not (tmp_path / "free").exists()


@pytest.mark.parametrize("place", ["/proc/nothing", "file/below"])
def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    setting = {"training.output_dir": tmp_path / place}
    with pytest.raises(UserError, match=rf"Cannot write training.output_dir=.*{place}"), locked(setting):
        pass


def test_what_a_killed_run_had_half_saved_is_removed_as_soon_as_the_folder_is_held(tmp_path: Path) -> None:
    half = (".tmp-0123abcd-run", "run/.tmp-0123abcd-adapter")
    with holder(tmp_path / "run") as first:
        for name in (*half, ".tmp-0123abcd-other"):
            (tmp_path / name).mkdir(parents=True)
        with pytest.raises(UserError, match="in use"), locked({"training.output_dir": tmp_path / "run"}):
            pass
        assert all((tmp_path / name).is_dir() for name in half)
        first.kill()
    with locked({"training.output_dir": tmp_path / "run"}):
        assert sorted(path.name for path in tmp_path.rglob(".tmp-*")) == [".tmp-0123abcd-other"]
