"""Points, their settings and the names of their folders."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.sweeping.grid import expand, label, short_keys
from backends.errors import UserError

RULES = [{"match": "*.mlp.*", "use": "dense"}]


def names(axes, mode="grid"):
    return [point.name for point in expand(axes, mode)]


def test_a_grid_is_every_combination_in_order() -> None:
    axes = {"optimizer.lr": [1e-4, 1e-3], "training.seed": [1, 2]}
    assert names(axes) == ["lr=1e-4_seed=1", "lr=1e-4_seed=2", "lr=1e-3_seed=1", "lr=1e-3_seed=2"]
    assert [point.arguments for point in expand(axes, "grid")][1] == ("optimizer.lr=0.0001", "training.seed=2")


def test_zipped_axes_go_together() -> None:
    assert names({"optimizer.lr": [1e-4, 1e-3], "training.seed": [1, 2]}, "zip") == ["lr=1e-4_seed=1", "lr=1e-3_seed=2"]


def test_a_mapping_names_its_values() -> None:
    dense, half = expand({"backend.rules": {"dense": [], "half": RULES}}, "grid")
    assert (dense.name, half.name) == ("rules=dense", "rules=half")
    assert half.arguments == ('backend.rules=[{"match": "*.mlp.*", "use": "dense"}]',)
    assert half.values == {"backend.rules": RULES}


def test_values_that_are_lists_have_readable_names_too() -> None:
    assert names({"backend.rules": [[], RULES]}) == ["rules=value", "rules=match-.mlp.-use-dense"]


def test_a_section_takes_mappings_of_its_settings() -> None:
    (point,) = expand({"backend": [{"default": "dense", "rules": RULES}]}, "grid")
    assert point.arguments == ("backend.default=dense", 'backend.rules=[{"match": "*.mlp.*", "use": "dense"}]')


def test_paths_are_named_by_their_last_part_while_that_is_enough() -> None:
    assert names({"checkpoint.config_name": ["a/one", "b/two"]}) == ["config_name=one", "config_name=two"]
    assert names({"checkpoint.config_name": ["a/one", "b/one"]}) == ["config_name=a-one", "config_name=b-one"]
    assert names({"training.token_budget": ["22*N/100", 1e9]}) == ["token_budget=22-N-100", "token_budget=1e9"]


def test_keys_are_as_short_as_they_can_be_told_apart() -> None:
    assert short_keys(["model.dtype", "optimizer.lr", "+own.dtype"]) == {
        "model.dtype": "model.dtype",
        "optimizer.lr": "lr",
        "+own.dtype": "own.dtype",
    }


def test_names_that_would_be_equal_get_a_hash() -> None:
    found = names({"logging.sample_prompt": ["a b", "a/b", "A-B", "c"]})
    assert len({name.lower() for name in found}) == 4
    assert found[3] == "sample_prompt=c"
    assert all(re.fullmatch(r"sample_prompt=[aA]-[bB]-[0-9a-f]{6}", name) for name in found[:3])


VALUES = st.one_of(st.text(max_size=60), st.integers(), st.floats(allow_nan=False), st.booleans(), st.none())
AXES = st.dictionaries(
    st.sampled_from(["optimizer.lr", "training.seed", "logging.sample_prompt"]),
    st.lists(VALUES, min_size=1, max_size=4, unique_by=lambda value: label(value)),
    min_size=1,
)


@given(AXES)
def test_every_name_is_its_own_safe_and_short_enough(axes) -> None:
    points = expand(axes, "grid")
    assert len({point.name.lower() for point in points}) == len(points) == len(list(itertools.product(*axes.values())))
    for point in points:
        assert re.fullmatch(r"[A-Za-z0-9.+_=-]+", point.name)
        assert len(point.name) < 140
    assert [point.name for point in expand(axes, "grid")] == [point.name for point in points]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_labelled_exactly(value: float) -> None:
    assert float(label(value)) == value


@pytest.mark.parametrize(
    ("axes", "mode", "message"),
    [
        ({"optimizer.lr": 1e-3}, "grid", "Expected its values, a list or a mapping of names"),
        ({"optimizer.lr": []}, "grid", "Expected its values"),
        ({"optimizer.lr": [1e-3, 0.001]}, "grid", "optimizer.lr: 0.001 twice"),
        ({"backend.rules": {"a": [], "b": []}}, "grid", "backend.rules: [] twice"),
        ({"optimizer.lr": [1, 2], "training.seed": [1]}, "zip", "numbers differ: optimizer.lr 2, training.seed 1"),
        ({"training.output_dir": ["a"]}, "grid", "cannot be given to a sweep"),
    ],
)
def test_mistakes(axes, mode, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        expand(axes, mode)
