"""A checkpoint with one byte less, more or other is named and skipped."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.checkpointing.manifest import complete_checkpoint, flaw, newest_complete
from apps.training.checkpointing.reading import newest, open_checkpoint
from backends.errors import UserError
from tests.apps.training.checkpointing.toys import save


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    save(folder, 9, 10, world_size=2)
    return folder


FILES = [
    "model-00001-of-00002.safetensors",
    "optimizer-00001-of-00002.safetensors",
    "optimizer-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "state.json",
    "metrics.csv",
]


@given(
    name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["cut", "flip", "grow"])
)
def test_any_changed_byte_is_seen(two: Path, name: str, place: float, how: str) -> None:
    path = two / "iter_10" / name
    content = path.read_bytes()
    at = int(place * len(content))
    changed = {
        "cut": content[:at],
        "flip": content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :],
        "grow": content + b"\0",
    }[how]
    try:
        path.write_bytes(changed)
        found = flaw(two / "iter_10")
        assert found is not None
        assert found.startswith(name)
        assert ("sha256" in found) == (how == "flip")
    finally:
        path.write_bytes(content)
    assert flaw(two / "iter_10") is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json, its writing was cut short."),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read (JSONDecodeError)."),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read (ValueError)."),
        (lambda folder: (folder / "manifest.json").write_text('{"files": {}}'), "cannot be read (KeyError)."),
        (lambda folder: (folder / FILES[1]).unlink(), f"{FILES[1]} is missing."),
        (lambda folder: (folder / FILES[0]).write_bytes(b"1234"), f"{FILES[0]} has 4 bytes, manifest.json says"),
    ],
)
def test_the_one_before_is_taken_and_the_flaw_is_named(
    two: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, reason: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two, folder)
    damage(folder / "iter_10")
    found = newest(folder)
    assert found is not None
    assert found.step == 9
    told = capsys.readouterr().err
    assert told.startswith(f"warning: skipping checkpoint {folder}/iter_10: ")
    assert reason in told
    assert told.count("\n") == 1
    with pytest.raises(UserError, match="iter_10 is not complete"):
        open_checkpoint(folder / "iter_10")
    assert open_checkpoint(folder).step == 9


def test_steps_are_compared_as_numbers(two: Path) -> None:
    assert newest_complete(two) == two / "iter_10"
    assert complete_checkpoint(two / "iter_9") == two / "iter_9"


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_checkpoints_is_an_error_only_where_one_was_asked_for(tmp_path: Path, made: bool) -> None:
    folder = tmp_path / "none"
    if made:
        folder.mkdir()
        (folder / "iter_x").mkdir()
    assert newest(folder) is None
    there = "holds no complete checkpoint" if made else "is not there"
    with pytest.raises(UserError, match=rf"checkpoint.load_path={folder} {there}.*save=true\.$"):
        open_checkpoint(folder)


def test_a_runs_folder_is_told_where_its_checkpoints_lie(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "iter_2").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"Did you mean {tmp_path}/checkpoints\?"):
        open_checkpoint(tmp_path)


def test_another_format_is_not_guessed_at(two: Path, tmp_path: Path) -> None:
    shutil.copytree(two, tmp_path / "copy")
    path = tmp_path / "copy" / "iter_10" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert flaw(path.parent) == "its format is 2, this program reads 1."
