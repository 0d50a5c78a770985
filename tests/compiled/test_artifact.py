"""The artifact file: what it refuses, what it finds, and that no damage reaches the machine code."""

import errno
import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.errors import UserError
from compiled.artifact import Artifact, Nearest, find, open_artifact, pack, peek, read_member
from compiled.regions import RegionSpec
from compiled.spec import SCHEMA_VERSION, StepSpec
from tests.compiled.test_spec import make_spec

CODE = {"regions/a": bytes(range(64)), "regions/b": b"\x7fELF" + b"code" * 9, "graphs/a.txt": b"def forward(x): ..."}


def manifest_of(spec: StepSpec) -> dict[str, Any]:
    parts = {
        "routing": [],
        "regions": {},
        "schedule": {},
        "optimizer": {},
        "cost": {},
        "parameters": 0,
        "trained_parameters": 0,
        "trace_seconds": 0.0,
        "compile_seconds": 0.0,
    }
    return {"spec": spec.to_json(), **parts}


def content(spec: StepSpec | None = None) -> bytes:
    return pack(manifest_of(spec or make_spec()), CODE.items())


def write(folder: Path, spec: StepSpec, name: str | None = None) -> Path:
    path = folder / (name or spec.file_name)
    path.write_bytes(content(spec))
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damage") / "x.substrate"


def refused_or_harmless(path: Path, damaged: bytes) -> bool:
    """Whether the file is refused with one line; if it is not, everything in it must be as it was written."""
    path.write_bytes(damaged)
    try:
        artifact = open_artifact(path)
    except UserError as error:
        message = str(error)
    else:
        assert artifact.spec == make_spec().to_json()
        assert {name: read_member(artifact, name) for name in artifact.manifest["members"]} == CODE
        return False
    assert "\n" not in message
    assert "command=compile" in message
    return True


def test_what_is_packed_comes_out_and_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    artifact = open_artifact(write(tmp_path, make_spec()))
    assert artifact.spec == make_spec().to_json()
    assert artifact.device_type == "cpu"
    assert {name: read_member(artifact, name) for name in CODE} == CODE
    assert artifact.manifest["members"] == {name: hashlib.sha256(data).hexdigest() for name, data in CODE.items()}
    assert content() == content()


@settings(max_examples=300)
@given(st.data())
def test_altered_bytes_are_refused_or_change_nothing(scratch: Path, data: st.DataObject) -> None:
    damaged = bytearray(content())
    places = data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4))
    for place in places:
        damaged[place] ^= data.draw(st.integers(1, 255))
    refused_or_harmless(scratch, bytes(damaged))


def test_every_single_byte_of_the_directory_may_be_damaged(scratch: Path) -> None:
    """The zip's own tables, which no sha256 covers: all of their bytes, in the ways that mean something to a reader."""
    whole = content()
    for place in range(whole.index(b"PK\x01\x02"), len(whole)):
        for mask in (0x01, 0x08, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            refused_or_harmless(scratch, bytes(damaged))


def test_no_altered_byte_of_code_graph_or_manifest_is_ever_accepted(scratch: Path) -> None:
    whole = content()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [archive.read(name) for name in archive.namelist()]
    for member in members:
        start = whole.index(member)
        for place in range(start, start + len(member), 7):
            damaged = bytearray(whole)
            damaged[place] ^= 0x20
            assert refused_or_harmless(scratch, bytes(damaged))


@settings(max_examples=200)
@given(st.data())
def test_every_truncation_is_refused(scratch: Path, data: st.DataObject) -> None:
    whole = content()
    assert refused_or_harmless(scratch, whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=200))
def test_a_file_that_is_no_artifact_is_refused(scratch: Path, data: bytes) -> None:
    assert refused_or_harmless(scratch, data)


@pytest.mark.parametrize(
    ("member", "old", "new", "message"),
    [
        ("manifest.json", b'"batch_size": 8', b'"batch_size": 9', "its manifest's sha256 is not the recorded one"),
        ("regions/b", b"codecode", b"evilcode", "the sha256 of regions/b is not the recorded one"),
    ],
)
def test_a_member_that_was_edited_and_zipped_again_is_refused(
    tmp_path: Path, member: str, old: bytes, new: bytes, message: str
) -> None:
    """The zip's own checksums are right then."""
    path = write(tmp_path, make_spec())
    with zipfile.ZipFile(path) as archive:
        members, comment = {name: archive.read(name) for name in archive.namelist()}, archive.comment
    members[member] = members[member].replace(old, new, 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        archive.comment = comment
    with pytest.raises(UserError, match=message):
        open_artifact(path)


def test_somebody_elses_zip_is_refused_and_passed_over(tmp_path: Path) -> None:
    for name, text in (("list", "[1]"), ("empty", "{}"), ("text", "no json")):
        with zipfile.ZipFile(tmp_path / f"{name}.substrate", "w") as archive:
            archive.writestr("manifest.json", text)
        with pytest.raises(UserError, match=f"{name}.substrate"):
            open_artifact(tmp_path / f"{name}.substrate")
        with pytest.raises(UserError, match=f"{name}.substrate"):
            peek(tmp_path / f"{name}.substrate")
    assert find(tmp_path, make_spec()) is None


def test_a_missing_file_or_a_folder_is_no_artifact(tmp_path: Path) -> None:
    for path in (tmp_path / "none.substrate", tmp_path):
        with pytest.raises(UserError, match=r"No artifact at .* existing \.substrate file, or compile one"):
            open_artifact(path)


def test_another_schema_version_is_refused_and_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, make_spec(versions={"schema": "0", "torch": "2.13.0"}))
    with pytest.raises(UserError, match=f"schema version 0, this program reads {SCHEMA_VERSION}"):
        open_artifact(path)
    assert find(tmp_path, make_spec()) is None


@pytest.mark.parametrize("manifest", [{}, {"spec": {}}, {"spec": {"versions": {}}}])
def test_a_whole_file_without_a_schema_version_is_refused(tmp_path: Path, manifest: dict[str, Any]) -> None:
    """A schema of other fields: every sha256 is right, and yet nothing that is looked up may be there."""
    (tmp_path / "later.substrate").write_bytes(pack(manifest, CODE.items()))
    for read in (open_artifact, peek):
        with pytest.raises(UserError, match=f"schema version None, this program reads {SCHEMA_VERSION}"):
            read(tmp_path / "later.substrate")
    assert find(tmp_path, make_spec()) is None


def test_a_whole_file_that_lacks_a_part_is_refused_by_its_name(tmp_path: Path) -> None:
    manifest = manifest_of(make_spec())
    del manifest["schedule"], manifest["cost"]
    (tmp_path / "x.substrate").write_bytes(pack(manifest, CODE.items()))
    with pytest.raises(UserError, match=r"lacks cost, schedule in its manifest; compile it again"):
        open_artifact(tmp_path / "x.substrate")


def test_require_accepts_an_equal_step_and_names_each_field_that_differs(tmp_path: Path) -> None:
    artifact = open_artifact(write(tmp_path, make_spec()))
    artifact.require(make_spec(model_name="renamed"), "COMMAND")
    with pytest.raises(UserError) as caught:
        artifact.require(make_spec(batch_size=4, head_chunks=3), "python compile --it")
    headline, *table = str(caught.value).splitlines()
    assert "2 field(s) differ" in headline
    assert headline.endswith("python compile --it")
    assert [line.split()[0] for line in table] == ["field", "batch_size", "head_chunks"]
    assert table[1].split() == ["batch_size", "|", "8", "|", "4"]


def test_find_takes_the_artifact_that_fits_whatever_its_name(tmp_path: Path) -> None:
    write(tmp_path, make_spec(batch_size=4))
    renamed = write(tmp_path, make_spec(), "from-a-friend.substrate")
    found = find(tmp_path, make_spec())
    assert isinstance(found, Artifact)
    assert found.path == renamed
    exact = write(tmp_path, make_spec())
    found = find(tmp_path, make_spec())
    assert isinstance(found, Artifact)
    assert found.path == exact


def test_find_gives_the_nearest_when_none_fits(tmp_path: Path) -> None:
    write(tmp_path, make_spec(batch_size=4, article_attention=True, head_chunks=2))
    close = write(tmp_path, make_spec(batch_size=4))
    (tmp_path / "broken.substrate").write_bytes(content()[:50])
    (tmp_path / "notes.txt").write_text("not looked at")
    found = find(tmp_path, make_spec())
    assert isinstance(found, Nearest)
    assert found.artifact.path == close
    assert [entry.field for entry in found.differences] == ["batch_size"]


def test_find_in_an_empty_or_missing_folder_is_none(tmp_path: Path) -> None:
    assert find(tmp_path, make_spec()) is None
    assert find(tmp_path / "missing", make_spec()) is None


def test_the_fitting_artifact_being_damaged_is_said_rather_than_hidden(tmp_path: Path) -> None:
    path = write(tmp_path, make_spec())
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=path.name):
        find(tmp_path, make_spec())


def test_peek_reads_the_manifest_alone(tmp_path: Path) -> None:
    path = write(tmp_path, make_spec())
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(CODE["regions/b"])] ^= 1
    path.write_bytes(bytes(damaged))
    assert peek(path)["spec"] == make_spec().to_json()
    assert json.dumps(peek(path)["members"])
    with pytest.raises(UserError, match="regions/b"):
        open_artifact(path)


def with_one_region(folder: Path) -> Artifact:
    """An artifact whose one region is no machine code, with every sha256 right."""
    code = b"not a shared library"
    region = RegionSpec("a", [], [], file="regions/a", sha256=hashlib.sha256(code).hexdigest())
    path = folder / "x.substrate"
    path.write_bytes(pack(manifest_of(make_spec()) | {"regions": {"a": region.to_json()}}, [("regions/a", code)]))
    return open_artifact(path)


def test_code_that_the_system_will_not_map_is_one_line(tmp_path: Path) -> None:
    """As on machines whose /tmp is mounted noexec."""
    with pytest.raises(UserError, match=r"Cannot load the machine code of .*x\.substrate: .*Set TMPDIR") as caught:
        with_one_region(tmp_path).load_regions()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("replaced_by", [pack({}, [("regions/b", b"code")]), b"no zip"])
def test_a_file_replaced_since_it_was_opened_is_one_line(tmp_path: Path, replaced_by: bytes) -> None:
    """As when it is compiled again while a run starts."""
    artifact = with_one_region(tmp_path)
    artifact.path.write_bytes(replaced_by)
    with pytest.raises(UserError, match=r"x\.substrate' is not a complete artifact|x\.substrate is altered") as caught:
        artifact.load_regions()
    assert "\n" not in str(caught.value)


def test_a_full_temporary_folder_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = with_one_region(tmp_path)

    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device.*Set TMPDIR"):
        artifact.load_regions()
