"""YAML as people write settings."""

import math

import pytest

from backends.errors import UserError
from backends.yaml_reading import parse_yaml


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
