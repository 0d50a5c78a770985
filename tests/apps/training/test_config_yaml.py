"""YAML as people write settings, and back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.training.config_yaml import parse_yaml, write_yaml
from backends.errors import UserError

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8")),
    st.sampled_from(
        ["1e-4", "1.e5", ".5E+3", "on", "null", "12:30", "0x10", "1_000", "=", "<<", "2020-01-01", "*.mlp.*"]
    ),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


@given(st.dictionaries(st.text(min_size=1), VALUES))
def test_what_is_written_reads_back_equal(value: dict[str, object]) -> None:
    assert parse_yaml(write_yaml(value), "text") == value


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", ".1e-3", "+1e-4", "0.0001"])
def test_a_number_needs_no_dot_before_its_exponent(text: str) -> None:
    assert math.isclose(parse_yaml(text, "text"), 1e-4)


def test_what_only_looks_like_a_number_stays_text() -> None:
    for text in ("e-4", "1e", "v1e5", "1e5x"):
        assert parse_yaml(text, "text") == text


def test_a_key_given_twice_is_a_mistake_at_its_place() -> None:
    with pytest.raises(UserError, match="Cannot read FILE at line 2, column 1: key 'a' is given twice. Expected YAML."):
        parse_yaml("a: 1\na: 2\n", "FILE")


def test_no_tag_builds_an_object() -> None:
    with pytest.raises(UserError, match="could not determine a constructor"):
        parse_yaml("!!python/object/apply:os.getcwd []", "FILE")


def test_equal_lists_are_written_out() -> None:
    rules = [1, 2]
    assert write_yaml({"a": rules, "b": rules}) == "a:\n- 1\n- 2\nb:\n- 1\n- 2\n"
