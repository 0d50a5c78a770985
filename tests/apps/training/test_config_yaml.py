"""YAML as people write settings, and back."""

from hypothesis import given
from hypothesis import strategies as st

from apps.training.config_yaml import write_yaml
from backends.yaml_reading import parse_yaml

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


def test_equal_lists_are_written_out() -> None:
    rules = [1, 2]
    assert write_yaml({"a": rules, "b": rules}) == "a:\n- 1\n- 2\nb:\n- 1\n- 2\n"
