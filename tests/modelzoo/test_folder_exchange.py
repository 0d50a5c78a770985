"""Two folders change their names."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from modelzoo import folder_exchange
from modelzoo.folder_exchange import exchange


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    return tmp_path / "new", tmp_path / "old"


def content(folder: Path) -> dict[str, str]:
    return {path.name: (path / "name").read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("library", ["system", "too old"])
def test_both_names_stay_and_mean_the_other(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    if library == "too old":
        monkeypatch.setattr(folder_exchange, "_LIBC", SimpleNamespace())
    exchange(*folders)
    assert content(folders[0].parent) == {"new": "old", "old": "new"}


def test_the_system_does_it_at_once(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "rename")
    exchange(*folders)
    assert content(folders[0].parent) == {"new": "old", "old": "new"}


def test_a_failing_rename_puts_the_old_one_back(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rename, calls = os.rename, []

    def fail_once(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(folder_exchange, "_LIBC", SimpleNamespace())
    monkeypatch.setattr(os, "rename", fail_once)
    with pytest.raises(OSError, match="Input/output error"):
        exchange(*folders)
    assert content(folders[0].parent) == {"new": "new", "old": "old"}


def test_a_name_that_is_not_there_is_an_error(folders: tuple[Path, Path]) -> None:
    with pytest.raises(FileNotFoundError):
        exchange(folders[0], folders[1].with_name("none"))
