import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.routing_table import count_text, plain_table, shorten


def expand(pattern: str) -> list[str]:
    """The names a brace pattern stands for, written independently of `shorten`."""
    choices = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        if not piece.startswith("{"):
            choices.append([piece])
            continue
        words = []
        for word in piece[1:-1].split(","):
            run = re.fullmatch(r"(\d+)-(\d+)", word)
            words += [str(n) for n in range(int(run[1]), int(run[2]) + 1)] if run else [word]
        choices.append(words)
    return ["".join(words) for words in product(*choices)]


WORDS = st.sampled_from(
    ["q_proj", "k_proj", "gate_up_proj", "gate_down_proj", "mlp", "attn", "0", "1", "2", "3", "7", "07"]
)
NAMES = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(".".join), unique=True, max_size=30)


@given(NAMES)
def test_shortened_names_stand_for_exactly_the_names_given(names):
    assert sorted(name for pattern in shorten(names) for name in expand(pattern)) == sorted(names)


def test_a_transformers_layers_fold_into_one_line():
    names = [f"model.layers.{i}.mlp.{p}_proj" for i in range(22) for p in ("gate", "up", "down")]
    assert shorten(names) == ["model.layers.{0-21}.mlp.{gate,up,down}_proj"]


def test_gaps_in_the_numbers_are_shown():
    assert shorten([f"layers.{i}.fc" for i in (0, 1, 2, 5, 7, 8)]) == ["layers.{0-2,5,7-8}.fc"]


@pytest.mark.parametrize(
    ("names", "shortened"),
    [
        ([], []),
        (["lm_head"], ["lm_head"]),
        (["a.key", "a.query"], ["a.{key,query}"]),
        (["b.in_proj_x", "b.out_proj_x"], ["b.{in,out}_proj_x"]),
        (["b.fc_in", "b.fc_out"], ["b.fc_{in,out}"]),
        (["a", "a.b"], ["a", "a.b"]),
    ],
)
def test_shorten(names, shortened):
    assert shorten(names) == shortened


def test_plain_table_aligns_columns():
    assert plain_table([("name", "n"), ("a", "10"), ("bcdef", "7")], right=[1]) == "name    n\na      10\nbcdef   7"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (1000, "1 k"), (1234567, "1.23 M"), (7e9, "7 G"), (2e12, "2 T")]
)
def test_count_text(value, text):
    assert count_text(value) == text
