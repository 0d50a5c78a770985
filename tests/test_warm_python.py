"""What a program is given by whoever starts it, it has; and what it ends with, they are told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm_python

pytestmark = pytest.mark.skipif(
    "TESTS_PYTHON" not in os.environ, reason="not on Linux, or beside a GPU: each starts itself"
)

PROGRAM = """
import os, signal, sys, time
print(sys.argv[1:], os.getcwd(), os.environ["GIVEN"], __name__, sys.path[0], sys.stdin.read())
print("complaint", file=sys.stderr)
print("torch" in sys.modules, "modelzoo" in sys.modules, os.getpid(), flush=True)
how = sys.argv[1]
if how == "wait":
    time.sleep(600)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({"mistake": 2, "message": "said"}.get(how))
"""


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(PROGRAM)
    return [warm_python.python(), str(tmp_path / "program.py")]


@pytest.mark.parametrize(("how", "code"), [("well", 0), ("mistake", 2), ("message", 1), ("killed", -signal.SIGKILL)])
def test_a_program_has_what_it_is_given_and_ends_as_it_says(
    words: list[str], tmp_path: Path, how: str, code: int
) -> None:
    ended = subprocess.run(
        [*words, how, "two words"],
        cwd=tmp_path,
        env=os.environ | {"GIVEN": "ünicode"},
        input="typed",
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    given, modules = ended.stdout.splitlines()
    assert given == f"['{how}', 'two words'] {tmp_path} ünicode __main__ {tmp_path} typed"
    assert modules.startswith("True False ")
    assert ended.stderr == "complaint\n" + ("said\n" if how == "message" else "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_program(words: list[str], number: int) -> None:
    """Also SIGKILL of the process that was started, which is another: the program must not outlive it."""
    environment = os.environ | {"GIVEN": ""}
    with subprocess.Popen(
        [*words, "wait"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as started:
        assert started.stdout is not None
        started.stdout.readline()
        program = int(started.stdout.readline().split()[-1])
        assert program != started.pid
        started.send_signal(number)
        assert started.stdout.read() == ""  # the last who could write has ended
        assert started.wait() == -number


def test_a_traceback_is_that_of_the_program(words: list[str]) -> None:
    ended = subprocess.run([*words, "well"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (ended.returncode, "KeyError: 'GIVEN'" in ended.stderr) == (1, True)


def test_other_uses_of_python_are_pythons_own() -> None:
    code = "import sys; print('torch' in sys.modules)"
    shown = subprocess.run([warm_python.python(), "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False\n"
    shown = subprocess.run([warm_python.python(), "-m", "json.tool"], input="[1]", capture_output=True, text=True)
    assert shown.stdout == "[\n    1\n]\n"
    assert sys.executable != warm_python.python()


def test_every_program_shares_compiled_regions(tmp_path: Path) -> None:
    """By one wrapper around the compiler, not by one more with each program: the second would wait for the first."""
    program = tmp_path / "program.py"
    program.write_text("import torch\nprint(torch._inductor.aot_compile)\n")
    for _ in range(2):
        shown = subprocess.run([warm_python.python(), program], capture_output=True, text=True, check=True).stdout
        assert shown.count("compile_or_copy") == shown.count("partial") == 1
