"""Which compiler a name means, and what an artifact says of it."""

import hashlib
from pathlib import Path

import pytest

from backends.errors import UserError
from compiled.mlir.compilers import compiler_name, describe_target, find_compiler
from tests.compiled.mlir import python_compilers

NAMED = "tests.compiled.mlir.python_compilers:NamedFunction"


def test_iree_is_asked_for_what_it_takes() -> None:
    found = {dialect: compiler_name("auto", dialect) for dialect in ("linalg", "stablehlo", "torch", "tosa")}
    assert found == {"linalg": "iree", "stablehlo": "iree", "torch": "iree", "tosa": None}
    assert compiler_name("none", "linalg") is None
    assert compiler_name(NAMED, "tosa") == NAMED


def test_the_spec_names_the_compiler_and_its_version() -> None:
    assert describe_target("tosa", "auto") == {"kind": "mlir", "dialect": "tosa"}
    source = hashlib.sha256(Path(python_compilers.__file__).read_bytes()).hexdigest()[:12]
    assert describe_target("tosa", NAMED) == {
        "kind": "mlir",
        "dialect": "tosa",
        "compiler": NAMED,
        "compiler_version": source,
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gcc", "Unknown MLIR compiler 'gcc'. Expected iree or package.module:Class"),
        ("no_such_lab:Own", "Cannot import module 'no_such_lab' of MLIR compiler"),
        ("pathlib:Path", "'pathlib:Path' is no MLIR compiler"),
        (NAMED.replace("NamedFunction", "Unfinished"), "lacks load. Write both"),
    ],
)
def test_what_is_no_compiler_is_refused(name: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        find_compiler(name)
    assert told in str(refused.value)
