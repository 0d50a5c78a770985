"""How many tokens to train on, as an expression of the model's size: `22*N/100`, `20*(N - 1e6)`, `1e9`. No torch.

Numbers, N, N_non_embedding, + - * / ** and parentheses; anything else is refused. Python's parser reads the text,
nothing of it is executed. Decimal numbers are exact: `0.1*N` of a thousand parameters is a hundred tokens, not a bit
more.
"""

from __future__ import annotations

import ast
import math
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from backends.errors import UserError

NAMES = ("N", "N_non_embedding")
LONGEST = 200  # characters
LARGEST = Fraction(10) ** 40  # of any number on the way: more tokens than anybody will see, and quickly computed
_SOME_SIZE = 1_000_000_007  # stands for the parameters while there is no model: no formula will be 0 there by chance
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True)
class TokenBudget:
    """`text` came to `tokens`; a step takes `tokens_per_step` (rows of all workers × positions in a row)."""

    text: str
    tokens: int
    tokens_per_step: int

    @property
    def steps(self) -> int:
        """Optimizer steps that see at least the budget: ⌈tokens / tokens per step⌉."""
        return -(-self.tokens // self.tokens_per_step)

    def __str__(self) -> str:
        steps = f"{self.steps:,} steps of {self.tokens_per_step:,} tokens"
        return f"Token budget: {self.text} = {self.tokens:,} tokens → {steps}"


def check_budget(text: str) -> None:
    """UserError for what cannot be read or computed whatever the model."""
    tree = _parse(text)
    value = _evaluate(text, tree, dict.fromkeys(NAMES, _SOME_SIZE))
    if not any(isinstance(node, ast.Name) for node in ast.walk(tree)):
        _require_tokens(text, value)


def count_tokens(text: str, sizes: Mapping[str, int]) -> int:
    """The tokens that `text` comes to, rounded up. `sizes`: the parameters each of `NAMES` stands for.

    UserError when it is no expression of them, or comes to nothing.
    """
    value = _evaluate(text, _parse(text), sizes)
    _require_tokens(text, value)
    return math.ceil(value)


def _parse(text: str) -> ast.expr:
    if len(text) > LONGEST:
        raise _wrong(text[:40] + "…", f"it has {len(text)} characters, at most {LONGEST} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of "1or 2"
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _wrong(text, "it cannot be read") from None


def _evaluate(text: str, node: ast.expr, sizes: Mapping[str, int]) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool) and math.isfinite(number):
            value = Fraction(repr(number))
        case ast.Name(id=name) if name in sizes:
            value = Fraction(sizes[name])
        case ast.Name(id=name):
            raise _wrong(text, f"it has '{name}', names are {' and '.join(sizes)}")
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            value = _evaluate(text, inner, sizes) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            value = _power(text, _evaluate(text, left, sizes), _evaluate(text, right, sizes))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            first, second = _evaluate(text, left, sizes), _evaluate(text, right, sizes)
            if isinstance(op, ast.Div) and second == 0:
                raise _wrong(text, "it divides by zero")
            value = _OPERATORS[type(op)](first, second)
        case _:
            raise _wrong(text, "it has more than finite numbers, N, + - * / ** and parentheses")
    if abs(value) > LARGEST:
        raise _wrong(text, f"it has a number above {float(LARGEST):g}")
    return value


def _power(text: str, base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent, exact for a whole exponent; its size is known before it is computed."""
    if base == 0:
        if exponent < 0:
            raise _wrong(text, "it divides by zero")
        return base**0 if exponent == 0 else base
    if abs(exponent) > 1000 or abs(exponent * Fraction(_log10(abs(base)))) > 2 * _log10(LARGEST):
        raise _wrong(text, f"it has a number above {float(LARGEST):g}")
    if exponent.denominator == 1:
        return base**exponent.numerator
    if base < 0:
        raise _wrong(text, "it takes a root of a negative number")
    return Fraction(float(base) ** float(exponent))


def _log10(value: Fraction) -> float:
    return math.log10(value.numerator) - math.log10(value.denominator)


def _require_tokens(text: str, value: Fraction) -> None:
    if value <= 0:
        raise _wrong(text, f"it comes to {float(value):g} tokens")


def _wrong(text: str, problem: str) -> UserError:
    given = " ".join(text.split())
    return UserError(
        f"Wrong value training.token_budget={given}: {problem}. Expected a number of tokens, 1e9, or an expression of "
        "N, the number of parameters: 22*N/100."
    )
