"""Modules through a compiler, each in a process of its own."""

import pytest

from backends.errors import UserError
from compiled.mlir.binaries import compile_modules
from compiled.mlir.isolation import Limits

NAMED = "tests.compiled.mlir.python_compilers:NamedFunction"


def test_every_module_gets_its_binary() -> None:
    made = compile_modules({"embed": b"one", "head": b"two"}, NAMED, Limits(), at_a_time=2)
    assert {name: outcome.value for name, outcome in made.items()} == {"embed": b"one", "head": b"two"}


def test_all_that_have_none_are_named_with_their_reasons() -> None:
    modules = {"embed": b"refused", "head": b"two", "update": b"text"}
    with pytest.raises(UserError) as refused:
        compile_modules(modules, NAMED, Limits())
    told = str(refused.value)
    assert "makes no binary of region embed (such a thing is not done); update (returned str, not bytes)." in told
    assert "head" not in told
    assert "\n" not in told
