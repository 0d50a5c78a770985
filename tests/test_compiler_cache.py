"""The tests' own compiler: equal work is done once, anything that differs is compiled."""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.compiler_cache import main

# Writes its source and arguments, in capitals, to the file after -o, and counts its runs; a source with "fail" fails.
COMPILER = """
import sys
from pathlib import Path
arguments = sys.argv[1:]
with Path(__file__).with_suffix(".log").open("a") as log:
    log.write("run\\n")
source = Path(arguments[0]).read_text()
if "fail" in source:
    sys.exit(3)
Path(arguments[arguments.index("-o") + 1]).write_text(source.upper() + " ".join(arguments[1:-2]))
"""


class Session:
    """One folder of kept files and a compiler that counts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, folder / "kept"
        self.kept.mkdir()
        self.compiler = folder / "g++"
        self.compiler.write_text(f"#!{sys.executable}\n{COMPILER}")
        self.compiler.chmod(0o755)

    def compile(self, place: str, source: str, *flags: str, name: str = "region.cpp") -> tuple[int, str]:
        """Compile `source` in a folder of its own; what the compiler returned and wrote."""
        folder = self.folder / place
        folder.mkdir()
        (folder / name).write_text(source)
        output = folder / "region.o"
        returned = main(str(self.compiler), self.kept, [str(folder / name), *flags, "-o", str(output)])
        return returned, output.read_text() if output.exists() else ""

    @property
    def runs(self) -> int:
        log = self.compiler.with_suffix(".log")
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


def test_the_same_source_is_compiled_once_wherever_it_lies(session: Session) -> None:
    first = session.compile("a", "// /tmp/a/region.cpp\nint x;\n", "-c")
    second = session.compile("b", "// /tmp/b/region.cpp\nint x;\n", "-c")
    assert first == (0, "// /TMP/A/REGION.CPP\nINT X;\n-c")
    assert second == first
    assert session.runs == 1


def test_addresses_in_messages_are_no_difference(session: Session) -> None:
    first = session.compile("a", 'auto x = "<function f at 0x7f01>, 2";\n', "-c")
    assert session.compile("b", 'auto x = "<function f at 0x7fab>, 2";\n', "-c") == first
    session.compile("c", 'auto x = "<function g at 0x7fab>, 2";\n', "-c")
    session.compile("d", "auto x = 0x7fab;\n", "-c")
    session.compile("e", "auto x = 0x7f01;\n", "-c")
    assert session.runs == 4


@pytest.mark.parametrize(
    ("source", "flags", "name"),
    [
        ("int y;\n", ("-c",), "region.cpp"),
        ("int x;\n", ("-c", "-O3"), "region.cpp"),
        ("int x; // another comment than a whole line\n", ("-c",), "region.cpp"),
        ("// an object has no comments\nint x;\n", ("-c",), "region.o"),
    ],
)
def test_whatever_differs_is_compiled(session: Session, source: str, flags: tuple[str, ...], name: str) -> None:
    session.compile("a", "int x;\n", "-c")
    assert session.compile("b", source, *flags, name=name) == (0, source.upper() + " ".join(flags))
    assert session.runs == 2


def test_a_failure_is_told_and_not_kept(session: Session) -> None:
    assert session.compile("a", "fail\n", "-c") == (3, "")
    assert session.compile("b", "fail\n", "-c") == (3, "")
    assert session.runs == 2


def test_questions_go_to_the_compiler(session: Session, tmp_path: Path) -> None:
    (tmp_path / "header.h").write_text("int x;\n")
    for _ in range(2):
        assert main(str(session.compiler), session.kept, [str(tmp_path / "header.h"), "-E", "-o", "/dev/null"]) == 0
    assert session.runs == 2
    assert not list(session.kept.iterdir())


def test_a_header_is_preprocessed_once(session: Session) -> None:
    """Each process that compiles asks for it, to see whether the precompiled one is of the same text."""
    written = [session.compile(place, "#include <x.h>", "-E", name="header.hpp") for place in ("one", "two")]
    assert written == [(0, "#INCLUDE <X.H>-E")] * 2
    assert session.runs == 1


def test_processes_of_this_session_compile_through_it() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "from torch._inductor.cpp_builder import get_cpp_compiler as c; print(c())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "compiler_cache.py" in Path(shown.stdout.strip()).read_text()


@pytest.mark.skipif("g++" not in os.environ.get("TESTS_CXX", ""), reason="no g++, or not on Linux")
def test_wrappers_share_templates(tmp_path: Path) -> None:
    """Each library computes its own function; only those that need a new template are compiled in whole as well."""
    kept, log, compiler = tmp_path / "kept", tmp_path / "log", tmp_path / "g++"
    kept.mkdir()
    compiler.write_text(f'#!/bin/sh\necho run >>{log}\nexec {os.environ["TESTS_CXX"]} "$@"\n')
    compiler.chmod(0o755)

    def runs_of(number: str, kind: str) -> int:
        """Compile a wrapper that sums `number` and 1 in a vector of a type, check what it computes; g++ runs."""
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        source, library = folder / "region.wrapper.cpp", folder / "region.so"
        source.write_text(
            f'#include <vector>\nextern "C" double sum() {{ std::vector<{kind}> v; '
            f"v.push_back({number}); v.push_back(1); return v[0] + v[1]; }}\n"
        )
        wrapper = source.with_suffix(".o")
        assert main(str(compiler), kept, [str(source), "-O0", "-fPIC", "-c", "-o", str(wrapper)]) == 0
        assert main(str(compiler), kept, [str(wrapper), "-shared", "-fPIC", "-o", str(library)]) == 0
        function = ctypes.CDLL(str(library)).sum
        function.restype = ctypes.c_double
        assert function() == float(number) + 1
        counted = len(log.read_text().splitlines())
        log.unlink()
        return counted

    assert runs_of("40", "int") == 3  # without templates, in whole, the library
    assert runs_of("50", "int") == 2
    assert runs_of("1.5", "double") == 4  # a library that lacks a name, in whole, the library
    assert runs_of("2.5", "double") == 2
    assert runs_of("60", "int") == 2
