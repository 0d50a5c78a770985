"""Budgets in tokens, against Python's own arithmetic in fractions."""

import math
import re
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from apps.training.config import parse, to_mapping, to_yaml
from apps.training.token_budget import check_budget, count_tokens
from backends.errors import UserError

N = 7_919
SIZES = {"N": N, "N_non_embedding": 4_001}


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1e9", 10**9),
        ("1_000_000", 10**6),
        ("N", N),
        (" 20 * ( N_non_embedding + 1 ) ", 80_040),
        ("22*N/100", 1743),  # 1742.18
        ("2**10", 1024),
        ("2**-2 * N", 1980),  # 1979.75
        ("N**0.5", 89),  # 88.99
        ("-N + 2*N", N),
        ("0.1*30", 3),  # in binary fractions a little more than 3
        ("1e-3*N - 7", 1),
    ],
)
def test_values(text: str, tokens: int) -> None:
    check_budget(text)
    assert count_tokens(text, SIZES) == tokens


NUMBERS = st.one_of(st.integers(0, 10**6).map(str), st.decimals(0, 1000, places=3).map(str), st.just("N"))
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
def test_any_expression_is_worth_what_fractions_say(text: str) -> None:
    exact = re.sub(r"\d+(\.\d+)?", lambda number: f"Fraction('{number.group()}')", text)
    try:
        expected = eval(exact, {"Fraction": Fraction, "N": Fraction(N)})
    except ZeroDivisionError:
        expected = Fraction(0)
    assume(len(text) <= 200)
    if expected > 0:
        assert count_tokens(text, SIZES) == math.ceil(expected)
    else:
        with pytest.raises(UserError):
            count_tokens(text, SIZES)


@given(st.text(st.sampled_from("N0129.eE_+-*/() jx'[],:=\n\0"), max_size=40))
def test_no_text_does_anything_but_count_or_be_refused_in_one_line(text: str) -> None:
    refusal = ""
    try:
        assert count_tokens(text, SIZES) >= 1
    except UserError as error:
        refusal = str(error)
    assert "\n" not in refusal


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("22*M/100", "it has 'M', names are N and N_non_embedding"),
        ("22*N/", "it cannot be read"),
        ("", "it cannot be read"),
        ("1e400", "it has more than finite numbers"),
        ("True", "it has more than finite numbers"),
        ("N % 3", "it has more than finite numbers"),
        ("max(N, 3)", "it has more than finite numbers"),
        ("__import__('os').system('true')", "it has more than finite numbers"),
        ("N.real", "it has more than finite numbers"),
        ("'N'", "it has more than finite numbers"),
        ("1j", "it has more than finite numbers"),
        ("N if N else 1", "it has more than finite numbers"),
        ("N/0", "it divides by zero"),
        ("0**-1", "it divides by zero"),
        ("(-8)**0.5", "it takes a root of a negative number"),
        ("9**9**9**9", "it has a number above 1e+40"),
        ("1e41", "it has a number above 1e+40"),
        ("0", "it comes to 0 tokens"),
        ("3 - 5", "it comes to -2 tokens"),
        ("+".join(["N"] * 150), "at most 200 are read"),
        ("(" * 99 + "N", "it cannot be read"),
    ],
)
def test_mistakes_are_told_when_the_settings_are_read(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)) as error:
        parse(["command=run", f"training.token_budget={text}"] if text else ["command=run", "training.token_budget= "])
    assert "\n" not in str(error.value)
    assert "22*N/100" in str(error.value)


def test_steps_and_tokens_exclude_each_other() -> None:
    with pytest.raises(UserError, match="at most one of training.max_steps and training.token_budget; got 5 and 1e9"):
        parse(["command=run", "training.max_steps=5", "training.token_budget=1e9"])


@pytest.mark.parametrize("text", ["1e9", "22*N/100"])
def test_a_budget_survives_its_yaml(text: str, tmp_path) -> None:
    config = parse(["command=run", f"training.token_budget={text}"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert to_mapping(parse([f"config={tmp_path / 'config.yaml'}"])) == to_mapping(config)


def test_a_number_in_a_file_is_a_budget_too(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("training: {token_budget: 1.5e9}\n")
    budget = parse(["command=run", f"config={tmp_path / 'run.yaml'}"]).training.token_budget
    assert count_tokens(budget, SIZES) == 1_500_000_000
