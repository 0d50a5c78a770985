"""YAML as people write settings."""

import math
import re

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


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "a: [2024-13-45]",
            "Cannot read FILE at line 1, column 5: '2024-13-45' is no timestamp (month must be in 1..12)",
        ),
        ("a: !!int x", "'x' is no int"),
        ("a: !!bool x", "'x' is no bool"),
        ("a: !!timestamp x", "'x' is no timestamp"),
        ("a: " + "1" * 5000, "'" + "1" * 40 + "' is no int"),
    ],
)
def test_a_value_that_only_looks_like_one_is_a_mistake_at_its_place(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)) as raised:
        parse_yaml(text, "FILE")
    assert "a text that looks like one has to be quoted" in str(raised.value)
