"""Native code that dies in any of its ways becomes one line, and the other tasks go on."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from compiled.mlir.isolation import Limits, Outcome, run_isolated


def crash() -> None:
    os.write(2, b"about to go\n")
    os.kill(os.getpid(), signal.SIGSEGV)


def report_and_raise() -> None:
    os.write(2, b"loc(\"x\"): error: 'aten.foo' cannot be lowered\nnote: see above\n")
    raise RuntimeError("Lowering failed\nmore lines")


def start_a_program() -> None:
    subprocess.run(["sleep", "60"])


def test_every_end_is_told_and_the_others_finish() -> None:
    tasks = {
        "crash": crash,
        "raise": report_and_raise,
        "loop": start_a_program,
        "memory": lambda: bytearray(2**33),
        "leave": lambda: os._exit(3),
        "fine": lambda: "value",
    }
    seen: list[str] = []
    started = time.monotonic()
    outcomes = run_isolated(tasks, Limits(timeout_s=2, memory_gb=1), 2, lambda name, outcome: seen.append(name))
    assert time.monotonic() - started < 30
    assert list(outcomes) == list(tasks)
    assert sorted(seen) == sorted(tasks)
    problems = {name: outcome.problem for name, outcome in outcomes.items()}
    assert problems == {
        "crash": "crashed with SIGSEGV",
        "raise": "RuntimeError: Lowering failed",
        "loop": "took longer than 2 s",
        "memory": "needed more than 1 GiB of memory",
        "leave": "ended with code 3",
        "fine": None,
    }
    assert outcomes["fine"].value == "value"
    assert outcomes["crash"].output == "about to go\n"
    assert outcomes["raise"].error_lines == ["'aten.foo' cannot be lowered"]


def test_what_a_task_writes_on_stderr_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_isolated({"x": report_and_raise}, Limits())["x"].problem is not None
    assert capfd.readouterr().err == ""


def test_a_task_ends_with_its_parent() -> None:
    """Killed, the parent leaves no worker behind, nor what that had started."""
    code = """
        import subprocess, sys
        from compiled.mlir.isolation import Limits, run_isolated
        run_isolated({"x": lambda: subprocess.run(["sleep", "47.25"])}, Limits(60, 1))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    wait_until(lambda: sleepers() == 1)
    parent.kill()
    parent.wait()
    wait_until(lambda: sleepers() == 0)


def sleepers() -> int:
    found = 0
    for folder in os.listdir("/proc"):
        if folder.isdigit():
            try:
                with open(f"/proc/{folder}/cmdline", "rb") as file:
                    found += file.read() == b"sleep\x0047.25\x00"
            except OSError:
                continue
    return found


def wait_until(condition: object) -> None:
    for _ in range(300):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.1)
    raise AssertionError("did not happen within 30 s")


def test_error_lines_are_those_of_mlir() -> None:
    assert Outcome(output='-:3: error: bad\n"warning: no"\nerror: \n').error_lines == ["bad"]
