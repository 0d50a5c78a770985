"""Atomic files and folders: complete or not there, whatever happens in between."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apps.training.files import atomic_folder, atomic_path, require_writable
from backends.errors import UserError
from modelzoo import folder_filling


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_half(atomic, exception):
    with atomic as temporary:
        (temporary / "new" if temporary.is_dir() else temporary).write_text("half")
        raise exception


def test_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "deep" / "er" / "plot.png"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".png"
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == {"plot.png"}


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_the_old_file_and_no_trace(tmp_path, exception):
    (tmp_path / "a.txt").write_text("old")
    for target in (tmp_path / "a.txt", tmp_path / "not" / "there.txt"):
        with pytest.raises(exception):
            write_half(atomic_path(target), exception)
    assert names(tmp_path) == {"a.txt"}
    assert (tmp_path / "a.txt").read_text() == "old"


def test_folder_appears_complete(tmp_path):
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "sub" / "x").read_text() == "1"
    assert names(tmp_path) == {"out"}


def test_filled_folder_is_refused_before_the_block_runs(tmp_path):
    (tmp_path / "kept").write_text("old")
    with pytest.raises(UserError, match="is not empty"), atomic_folder(tmp_path):
        pytest.fail("the block ran")
    assert names(tmp_path) == {"kept"}


def test_of_two_writers_of_one_folder_the_first_wins(tmp_path):
    def write(name, meanwhile=None):
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / "x").write_text(name)
            if meanwhile is not None:
                meanwhile()

    with pytest.raises(UserError, match="is not empty"):
        write("second", meanwhile=lambda: write("first"))
    assert (tmp_path / "out" / "x").read_text() == "first"
    assert names(tmp_path) == {"out"}


def test_overwriting_exchanges_the_whole_folder_or_nothing(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_folder(out, overwrite=True), KeyboardInterrupt)
    assert names(out) == {"kept"}
    with atomic_folder(out, overwrite=True) as temporary:
        (temporary / "new").write_text("all")
    assert names(out) == {"new"}
    assert names(tmp_path) == {"out"}


def mounted(monkeypatch, path):
    monkeypatch.setattr(folder_filling, "mount_table", lambda: f"36 35 98:0 / {path} rw - ext4 /dev/sdb rw\n")


def test_a_mounted_volume_is_filled_and_replaced_by_its_content(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    mounted(monkeypatch, out)
    monkeypatch.setattr("apps.training.files.exchange", None)
    with atomic_folder(out) as temporary:
        (temporary / "metadata.yaml").write_text("1")
        (temporary / "tokenizer").mkdir()
        (temporary / "tokenizer" / "old").touch()
        assert temporary.parent == out
    with pytest.raises(UserError, match="is not empty"), atomic_folder(out):
        pytest.fail("the block ran")
    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_folder(out, overwrite=True), KeyboardInterrupt)
    assert names(out) == {"metadata.yaml", "tokenizer"}
    with atomic_folder(out, overwrite=True) as temporary:
        (temporary / "tokenizer").mkdir()
        (temporary / "metadata.yaml").write_text("2")
    assert names(out) == {"metadata.yaml", "tokenizer"}
    assert (out / "metadata.yaml").read_text() == "2"
    assert names(out / "tokenizer") == set()
    assert names(tmp_path) == {"out"}


def test_a_folder_that_cannot_be_exchanged_after_all_is_filled(tmp_path, monkeypatch):
    def fail(one, other):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("apps.training.files.exchange", fail)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "new").touch()
    assert names(tmp_path / "out") == {"new"}
    assert names(tmp_path) == {"out"}


def test_of_two_writers_of_one_volume_the_first_wins(tmp_path, monkeypatch):
    mounted(monkeypatch, tmp_path)
    with pytest.raises(UserError, match="is not empty"), atomic_folder(tmp_path):
        (tmp_path / "theirs").touch()
    assert names(tmp_path) == {"theirs"}


def test_a_volume_inside_a_folder_to_be_replaced_is_spared_before_the_block_runs(tmp_path, monkeypatch):
    (tmp_path / "out" / "volume").mkdir(parents=True)
    mounted(monkeypatch, tmp_path / "out" / "volume")
    with pytest.raises(UserError, match="mounted inside"), atomic_folder(tmp_path / "out", overwrite=True):
        pytest.fail("the block ran")
    assert names(tmp_path / "out") == {"volume"}


def test_a_link_to_another_disk_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "x").write_text("1")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "x").exists()


@pytest.mark.parametrize("atomic", [atomic_path, atomic_folder])
def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path, atomic):
    (tmp_path / "file").write_text("")
    expected = "Cannot write .*file/x.*Make room, or choose another place"
    with pytest.raises(UserError, match=expected), atomic(tmp_path / "file" / "x"):
        pytest.fail("the block ran")


def test_a_full_disk_is_one_clear_line_but_a_missing_input_stays_itself(tmp_path):
    with pytest.raises(UserError, match="No space left"), atomic_path(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x"):
        (tmp_path / "no such input").read_text()


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    code = (
        "import os, sys\nfrom apps.training.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as p:\n    p.write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code, str(target)], cwd=root, check=False).returncode == -9
    assert target.read_text() == "old"


def test_a_place_is_tried_before_the_work_and_left_as_it_was(tmp_path):
    require_writable(tmp_path / "new" / "deeper", "x.output_dir")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"Cannot write x\.output_dir=/proc/new: .* Choose another folder"):
        require_writable(Path("/proc/new"), "x.output_dir")


def test_a_place_one_may_not_even_look_into_is_refused(tmp_path, monkeypatch):
    """`Path.exists` raises for a folder below one without permission."""
    monkeypatch.setattr(Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
    require_writable(tmp_path / "new", "x.output_dir")
