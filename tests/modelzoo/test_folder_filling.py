"""Folders that cannot change their names: which they are, and what is in them at every moment of a save."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backends.errors import UserError
from modelzoo import folder_filling
from modelzoo.checkpoint_writing import written_beside
from modelzoo.folder_filling import holds_mount, is_fixed, mount_points, remove_folder, remove_leftovers, temporary_name

OLD = {
    "config.json": "old",
    "model.safetensors.index.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model-00002-of-00002.safetensors": "old",
    "tokenizer.json": "old",
}
NEW = {"config.json": "new", "model.safetensors": "new", "tokenizer.json": "new"}
OTHERS = {"metrics.csv": "ours", "checkpoints/iter_1/state.json": "ours"}


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and other things; a table of mounts says that `checkpoints` in it is one."""
    folder = tmp_path / "my run"
    write(folder, OLD | OTHERS)
    table = f"36 35 98:0 /a {tmp_path}/my\\040run/checkpoints rw,noatime master:1 - ext3 /dev/root rw\n"
    monkeypatch.setattr(folder_filling, "mount_table", lambda: table)
    return folder


def write(folder: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    """Of all but hidden folders."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {str(path.relative_to(folder)): path.read_text() for path in files}
    return {name: text for name, text in found.items() if not name.startswith(".")}


def save(folder: Path) -> None:
    with written_beside(folder, "checkpoint") as new:
        write(new, NEW)


def test_mount_points_are_read_with_their_escapes() -> None:
    table = (
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard\n"
        "90 27 254:0 /tmp/a\\040b /data/my\\040run/a\\134b\\011c rw shared:2 master:1 - ext4 /dev/vda rw\n"
    )
    assert mount_points(table) == [Path("/"), Path("/data/my run/a\\b\tc")]
    assert mount_points("") == []


def test_a_mount_is_looked_for_at_and_below_a_folder(volume: Path) -> None:
    assert [holds_mount(path) for path in (volume, volume / "checkpoints", volume.parent)] == [True] * 3
    assert not holds_mount(volume / "checkpoints" / "iter_1")
    assert not holds_mount(volume.with_name("my"))
    assert is_fixed(volume)
    assert temporary_name(volume).parent == volume
    assert temporary_name(volume / "new").parent == volume


def test_the_folder_we_work_in_is_fixed_and_a_plain_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "deeper").mkdir(parents=True)
    assert not is_fixed(tmp_path / "run")
    assert temporary_name(tmp_path / "run").parent == tmp_path
    for place in ("run", "run/deeper"):
        monkeypatch.chdir(tmp_path / place)
        assert is_fixed(tmp_path / "run")


def test_a_folder_below_one_that_takes_no_entry_is_fixed() -> None:
    assert is_fixed(Path("/proc/self/task").resolve())


@pytest.mark.parametrize("old", [OLD, {}], ids=["over an old one", "into an empty one"])
def test_a_save_fills_a_folder_with_a_mount_and_touches_nothing_else(volume: Path, old: dict[str, str]) -> None:
    for name in set(OLD) - set(old):
        (volume / name).unlink()
    inode = (volume / "checkpoints" / "iter_1" / "state.json").stat().st_ino
    save(volume)
    assert content(volume) == NEW | OTHERS
    assert (volume / "checkpoints" / "iter_1" / "state.json").stat().st_ino == inode
    assert not [path for path in (*volume.iterdir(), *volume.parent.iterdir()) if path.name.startswith(".")]


def test_whoever_is_killed_at_any_moment_leaves_one_whole_checkpoint(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each change to the disk in turn: the old one, or none that can be read and the new one for the next."""
    seen, moments = set(), 0
    while True:
        for path in volume.iterdir():
            if path.is_file():
                path.unlink()
        write(volume, OLD | OTHERS)
        with monkeypatch.context() as patch:
            if not killed(volume, patch, before=moments):
                break
        left = content(volume)
        if left == OLD | OTHERS:
            seen.add("old")
        elif left == NEW | OTHERS:
            seen.add("new")
        else:
            assert "config.json" not in left, left
            seen.add("none")
        begun = left != OLD | OTHERS or list(volume.glob(".new-*"))
        remove_leftovers(volume)
        assert content(volume) == (NEW if begun else OLD) | OTHERS
        assert not [path for path in volume.iterdir() if path.name.startswith(".")]
        moments += 1
    assert content(volume) == NEW | OTHERS
    assert seen == {"old", "none", "new"}
    assert moments > 10


def killed(folder: Path, patch: pytest.MonkeyPatch, before: int) -> bool:
    """Save to `folder` up to the change to the disk of this number; whether there were as many."""

    class Killed(BaseException):
        pass

    changes = 0

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal changes
            if changes == before:
                raise Killed
            changes += 1
            return change(*args, **kwargs)

        return call

    patch.setattr(folder_filling, "sync", counted(folder_filling.sync))
    for owner, name in ((os, "rename"), (os, "replace"), (Path, "unlink"), (Path, "rmdir")):
        patch.setattr(owner, name, counted(getattr(owner, name)))
    patch.setattr("modelzoo.checkpoint_writing.remove_folder", lambda folder: None)  # nobody who is killed tidies up
    try:
        save(folder)
    except Killed:
        return True
    return False


def test_a_folder_that_turns_out_to_be_fixed_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an overlay, whose lower folders cannot be renamed."""
    write(tmp_path / "run", OLD | OTHERS)

    def fail(one: Path, other: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("modelzoo.checkpoint_writing.exchange", fail)
    save(tmp_path / "run")
    assert content(tmp_path / "run") == NEW | OTHERS
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failing_move_says_where_the_rest_is_and_the_next_save_goes_on(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(UserError, match=r"Cannot save .*Input/output error; what is missing is in '.*/\.new-"):
            save(volume)
        with pytest.raises(UserError, match=r"cut short, .*Input/output error"):
            remove_leftovers(volume)
    assert "config.json" not in content(volume)
    save(volume)
    assert content(volume) == NEW | OTHERS
    assert not [path for path in volume.iterdir() if path.name.startswith(".")]


def test_only_what_our_own_writers_of_this_folder_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = (".tmp-0123abcd-run", "run/.tmp-89abcdef-run")
    others = (
        ".tmp-0123abcd-run2", ".tmp-0123abcd-a-run", ".tmp-0123abc-run", ".tmp-0123ABCD-run", ".old-0123abcd-run",
        "tmp-0123abcd-run", ".new-0123abcd-run", ".tmp-iter_1", "run/.tmp-89abcdef-other", ".tmp-11111111-run",
    )  # fmt: skip
    for name in (*ours, *others):
        write(tmp_path / name, {"model.safetensors": "half"})
    (tmp_path / ".tmp-22222222-run").write_text("a file")
    (tmp_path / ".tmp-33333333-run").symlink_to("run")
    monkeypatch.setattr(folder_filling, "mount_table", lambda: f"1 2 3:4 / {tmp_path}/.tmp-11111111-run/checkpoints rw")
    remove_leftovers(tmp_path / "run")
    assert not [name for name in ours if (tmp_path / name).exists()]
    assert [name for name in others if not (tmp_path / name / "model.safetensors").exists()] == []
    assert (tmp_path / ".tmp-22222222-run").exists()
    assert (tmp_path / ".tmp-33333333-run").exists()


def test_a_folder_with_a_mount_is_never_removed(volume: Path) -> None:
    remove_folder(volume)
    assert content(volume) == OLD | OTHERS


REAL = """
import subprocess, sys
from pathlib import Path
from modelzoo.folder_filling import fill, remove_folder, temporary_name
place, mounted = Path(sys.argv[1]), Path(sys.argv[2])
if subprocess.run(["mount", "--bind", place / "volume", mounted], capture_output=True).returncode:
    sys.exit(77)
new = temporary_name(place / "run")
new.mkdir()
(new / "config.json").write_text("new")
fill(new, place / "run", [])
remove_folder(place / "run")
"""


@pytest.mark.parametrize("mounted", ["run", "run/checkpoints"])
def test_on_a_real_mount(tmp_path: Path, mounted: str) -> None:
    write(tmp_path / "volume", {"iter_1/state.json": "kept"})
    (tmp_path / mounted).mkdir(parents=True)
    command = ["unshare", "-rm", sys.executable, "-c", REAL, str(tmp_path), str(tmp_path / mounted)]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip("mounting is not permitted here")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "volume" / "iter_1" / "state.json").read_text() == "kept"
    written = tmp_path / ("volume" if mounted == "run" else "run") / "config.json"
    assert written.read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "volume"}
