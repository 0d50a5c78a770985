"""The spec of a step: equal specs share a key, and every difference is named with both sides."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compiled.spec import (
    SCHEMA_VERSION,
    FieldDifference,
    StepSpec,
    cpu_features,
    describe_device,
    describe_versions,
    difference,
    difference_table,
    flatten,
    float32_library,
)

NAMES = st.text("abc_", min_size=1, max_size=4)
LEAVES = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.lists(st.integers(0, 3), max_size=3)
# every section holds something: an empty section says nothing, so it equals one that is absent
FIELDS = st.recursive(LEAVES, lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8)
SPECS = st.dictionaries(NAMES, FIELDS, min_size=1, max_size=4)


def make_spec(**changes: Any) -> StepSpec:
    spec = StepSpec(
        model_name="demo",
        model={"hidden_size": 32, "rope": {"theta": 1e4, "kind": "default"}},
        routing={"dense": {"layers": "model.*", "source": "aa"}},
        batch_size=8,
        max_seq_length=256,
        precision={"parameters": "float32", "compute": "float32"},
        article_attention=False,
        head_chunks=1,
        optimizer={"name": "adamw", "source": "bb"},
        device={"kind": "cpu", "isa": ["avx", "avx2"]},
        versions={"schema": str(SCHEMA_VERSION), "torch": "2.13.0"},
    )
    return dataclasses.replace(spec, **changes)


@given(SPECS)
def test_a_spec_does_not_differ_from_itself_however_its_fields_are_ordered(spec: dict[str, Any]) -> None:
    def reverse(value: Any) -> Any:
        return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    assert difference(spec, reverse(spec)) == []


@given(SPECS, SPECS)
def test_a_difference_is_found_exactly_when_there_is_one_and_from_both_sides(
    left: dict[str, Any], right: dict[str, Any]
) -> None:
    found = difference(left, right)
    same_text = json.dumps(left, sort_keys=True) == json.dumps(right, sort_keys=True)
    assert bool(found) == (left != right)
    assert not (same_text and found)
    mirrored = [FieldDifference(entry.field, entry.run, entry.artifact) for entry in difference(right, left)]
    assert found == mirrored


@given(SPECS, st.data())
def test_changing_one_leaf_names_that_leaf_alone(spec: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(flatten(spec))))
    changed = copy.deepcopy(spec)
    *folders, last = name.split(".")
    place = changed
    for folder in folders:
        place = place[folder]
    before, place[last] = place[last], "something else"
    assert difference(spec, changed) == [FieldDifference(name, before, "something else")]


@given(SPECS)
def test_a_field_that_only_one_side_has_shows_a_dash_on_the_other(spec: dict[str, Any]) -> None:
    extended = spec | {"zzz": 1}
    assert difference(extended, spec) == [FieldDifference("zzz", 1, "–")]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(StepSpec) if field.name != "model_name"])
def test_every_field_changes_key_file_name_and_difference(field: str) -> None:
    spec = make_spec()
    value = getattr(spec, field)
    changed = make_spec(**{field: value | {"new": 1} if isinstance(value, dict) else f"{value}x"})
    assert spec.key != changed.key
    assert spec.file_name != changed.file_name
    (found,) = difference(spec.to_json(), changed.to_json())
    assert found.field.split(".")[0] == field


def test_the_models_name_is_for_people_only() -> None:
    spec, renamed = make_spec(), make_spec(model_name="my-copy")
    assert spec.key == renamed.key
    assert difference(spec.to_json(), renamed.to_json()) == []
    assert renamed.file_name.startswith("my-copy-b8x256-float32-cpu-")


def test_a_spec_read_from_a_file_equals_the_one_just_made() -> None:
    spec = make_spec(model={"pair": (1, 2), 3: "three"})
    assert difference(json.loads(json.dumps(spec.to_json())), spec.to_json()) == []


def test_a_cpu_artifact_fits_every_cpu_that_has_what_it_was_made_for() -> None:
    small, large = {"device": {"isa": ["avx", "avx2"]}}, {"device": {"isa": ["avx", "avx2", "avx512f", "fma"]}}
    assert difference(small, large) == []
    assert difference(large, small) == [FieldDifference("device.isa", "needs avx512f fma", "not on this CPU")]


def test_the_table_has_a_row_for_each_difference_and_shortens_long_values() -> None:
    table = difference_table([FieldDifference("batch_size", 8, 4), FieldDifference("model.x", "y" * 99, None)])
    assert [re.split(r"\s+\|\s+", line.strip()) for line in table.splitlines()] == [
        ["field", "artifact", "this run"],
        ["batch_size", "8", "4"],
        ["model.x", "y" * 57 + "…", "None"],
    ]


def test_versions_name_the_schema_and_the_torch_that_makes_the_code() -> None:
    import torch

    assert describe_versions("cpu") == {"schema": str(SCHEMA_VERSION), "torch": torch.__version__}


def test_a_cpu_is_described_by_what_compilers_use_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor : 0\nflags\t\t: fpu sse2 avx2 ht avx512f constant_tsc fma avx2\nflags : other\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    isa = ["avx2", "avx512f", "fma", "sse2"]
    assert describe_device("cpu") == {"kind": "cpu", "isa": isa, "float32_products": "default"}


@pytest.mark.parametrize(
    ("maker", "flags", "library"),
    [
        ("AuthenticAMD", "avx2 avx512f", "onednn"),
        ("AuthenticAMD", "avx2", "default"),  # MKL's AVX2 kernels are as good
        ("GenuineIntel", "avx2 avx512f", "default"),
    ],
)
def test_float32_products_go_to_the_library_that_is_known_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, maker: str, flags: str, library: str
) -> None:
    import torch

    monkeypatch.setattr(Path, "read_text", lambda *_: f"vendor_id\t: {maker}\nflags\t: {flags}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert float32_library() == library


def test_a_system_without_cpuinfo_has_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert cpu_features() == []
