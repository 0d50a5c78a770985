"""What a kill leaves: at every moment a complete checkpoint, and nothing that the next start does not tidy up."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from apps.training.checkpointing import publishing
from apps.training.checkpointing.manifest import flaw, newest_complete
from apps.training.checkpointing.publishing import Publisher, clean, remove_later, require_no_later
from backends.errors import UserError
from tests.apps.training.checkpointing.toys import save


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("keep", "left"), [(1, {12}), (2, {12, 9}), (None, {2, 9, 12}), (9, {2, 9, 12})])
def test_the_newest_checkpoints_stay(tmp_path: Path, keep: int | None, left: set[int]) -> None:
    save(tmp_path, 2, 9, 12, keep=keep)
    assert set(names(tmp_path)) == {f"iter_{step}" for step in left}


def test_nobody_looks_at_old_checkpoints_that_all_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that saves often would read every manifest, and ask after every file, behind every one of them."""
    save(tmp_path, 1, 2)
    looked: list[Path] = []
    monkeypatch.setattr(publishing, "flaw", lambda folder, hashes: looked.append(folder))
    save(tmp_path, 3)
    assert looked == []


def test_a_broken_checkpoint_is_not_counted_and_stays_for_its_owner(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "iter_2" / "state.json").write_text("{}")
    (tmp_path / "iter_x").mkdir()
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["iter_2", "iter_3", "iter_4", "iter_x"]


class Death(Exception):
    pass


def die_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """The `number`-th change of the disk from now on, and all later ones, never happen. Returns how many were tried."""
    tried = [0]

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            tried[0] += 1
            if tried[0] >= number:
                raise Death
            return real(*arguments, **options)

        return call

    for name in ("rename", "replace", "unlink", "rmdir", "fsync"):
        monkeypatch.setattr(os, name, mortal(getattr(os, name)))
    monkeypatch.setattr(publishing, "exchange", mortal(publishing.exchange))
    monkeypatch.setattr(Publisher, "give_up", lambda *_: None)  # the dead tidy nothing up
    return lambda: tried[0]


@pytest.mark.parametrize("again", [False, True])
def test_killed_at_any_change_of_the_disk_a_whole_checkpoint_is_left(tmp_path: Path, again: bool) -> None:
    """Step 6 after 5 with keep=1; or `again` step 5, which is there, so that it has to be replaced."""
    step, number = 5 if again else 6, 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        save(folder, 5)
        with pytest.MonkeyPatch.context() as patch:
            tried = die_at(patch, number)
            with suppress(UserError):  # what the writer makes of a Death
                save(folder, step, keep=1)
            last = tried() < number
        found = newest_complete(folder)
        assert found is not None
        clean(folder)
        left = newest_complete(folder)
        assert left is not None
        assert left.name in ("iter_5", f"iter_{step}")
        assert all(name.startswith("iter_") for name in names(folder))
        assert all(flaw(folder / name) is None for name in names(folder))
        save(folder, 7, keep=1)  # and the next start can go on
        assert names(folder) == ["iter_7"]
        if last:
            break
    assert number > 10  # every file's fsync, the renames, each removal


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for name in (".tmp-iter_2", ".tmp-old-iter_1", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    clean(tmp_path)
    assert names(tmp_path) == ["iter_1", "notes"]


def test_cleaning_a_folder_that_is_not_there_is_no_matter(tmp_path: Path) -> None:
    clean(tmp_path / "none")
    remove_later(tmp_path / "none", 0)
    require_no_later(tmp_path / "none", 0)


def test_checkpoints_of_another_run_are_not_mixed_with_ours(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6)
    require_no_later(tmp_path, 6)
    with pytest.raises(UserError, match=r"checkpoint.save_path=.* holds iter_6, and this run starts anew\."):
        require_no_later(tmp_path, 0)
    with pytest.raises(UserError, match=r"holds iter_6, and this run goes on from step 4\..*resume=auto"):
        require_no_later(tmp_path, 4)
    require_no_later(tmp_path, 4, overwrite=True)
    remove_later(tmp_path, 4)
    assert names(tmp_path) == ["iter_2", "iter_4"]


def test_a_later_one_that_is_damaged_is_in_nobodys_way(tmp_path: Path) -> None:
    """The newest was altered, so the run went on from the one before; that one must not be pruned for it."""
    save(tmp_path, 2, 4, 6)
    path = tmp_path / "iter_6" / "state.json"
    path.write_bytes(path.read_bytes().replace(b"6", b"7"))  # of the right size, so only its hash tells
    require_no_later(tmp_path, 4)
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["iter_5", "iter_6"]
    save(tmp_path, 6, keep=1)
    assert names(tmp_path) == ["iter_6"]
    assert newest_complete(tmp_path) == tmp_path / "iter_6"
