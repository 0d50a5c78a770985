"""A job that cannot go on ends: all of it, soon, non-zero, with one message that names worker and reason."""

import os
from pathlib import Path

import pytest

from tests.apps.training.workers.launchers import BESIDE_PYTHON, Ended, command, find_openmpi, finish, run, start_words
from tests.apps.training.workers.loop import TIMEOUT

APPS = Path(__file__).resolve().parents[4] / "apps"
LAUNCHERS = ["mpich", "torchrun", "openmpi"]
SOON = 15.0


def only_error(ended: Ended) -> str:
    assert ended.code != 0
    assert ended.seconds < SOON + TIMEOUT
    assert "saved" not in ended.out
    (error,) = ended.errors
    return error


@pytest.mark.parametrize(("launcher", "rank"), [("mpich", 0), ("mpich", 1), ("torchrun", 0), ("openmpi", 0)])
def test_a_killed_worker_is_named(launcher: str, rank: int) -> None:
    error = only_error(run(launcher, "killed", str(rank)))
    assert error.startswith(f"error: Worker {rank} of 2 (")
    assert error.endswith("is gone without a word, as when it is killed or out of memory; "
                          "last heard of at: reading rows of step 10.")  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_bug_in_one_worker_is_one_traceback_and_one_line(launcher: str) -> None:
    ended = run(launcher, "bug", "1")
    assert only_error(ended).endswith("): ZeroDivisionError: a bug")
    assert only_error(ended).startswith("error: Worker 1 of 2 (")
    assert ended.err.count('raise ZeroDivisionError("a bug")') == 1
    assert ended.err.index("raise ZeroDivisionError") < ended.err.index("error: Worker 1")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_stopped_worker_is_named_within_the_timeout_and_nothing_is_left_of_the_job(launcher: str) -> None:
    marker = f"substrate-{os.getpid()}-{launcher}"
    error = only_error(run(launcher, "stopped", "1", SUBSTRATE_TEST_MARKER=marker))
    assert "Worker 1 of 2" in error
    assert "has shown no sign of life for 3.5 s: reading rows of step 10." in error
    assert alive_with(marker) == []


def alive_with(marker: str) -> list[str]:
    """Command lines of processes, workers or watch, that have `marker` in their environment (none without /proc)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_a_stuck_worker_is_named_and_those_who_wait_for_it_are_not() -> None:
    error = only_error(run("mpich", "stuck", "0"))
    assert "Worker 0 of 2" in error
    assert "has made no progress for 3.5 s: reading rows of step 10. Raise its.timeout if it needs longer." in error


def test_a_mistake_that_all_workers_find_is_said_once() -> None:
    ended = run("mpich", "mistake-of-all", "0")
    assert (ended.code, only_error(ended)) == (2, "error: No such folder: data.")
    assert "Traceback" not in ended.err


def test_a_mistake_that_one_worker_finds_names_it() -> None:
    ended = run("mpich", "mistake", "1")
    assert ended.code == 2
    assert only_error(ended).startswith("error: Worker 1 of 2 (")
    assert only_error(ended).endswith("): No such file: rows.h5.")


@pytest.mark.parametrize("launcher", ["mpich", "torchrun"])
def test_a_bad_setting_is_said_once_before_the_workers_have_met(launcher: str) -> None:
    ended = run(launcher, "bad-setting", "0")
    assert only_error(ended) == "error: Unknown setting."
    assert launcher == "torchrun" or ended.code == 2  # torchrun has a code of its own


def test_a_bad_setting_of_one_worker_ends_all() -> None:
    assert only_error(run("mpich", "bad-setting-of-one", "1")).endswith("): Unknown setting.")


@pytest.mark.parametrize(
    "words",
    [
        ["prepare_data.py", "input=nowhere/*.txt"],
        ["train_llm.py", "command=compile", "checkpoint.model_name_or_path=nowhere"],
    ],
)
def test_work_of_the_first_worker_alone_fails_without_waiting_for_the_others(words: list[str]) -> None:
    """The others had ended, and MPI waited for them for ever, at full speed."""
    program = [*command("mpich", 2), str(APPS / words[0]), *words[1:]]
    ended = finish(start_words(program, {}))
    assert ended.code == 2
    assert "nowhere" in only_error(ended)


def test_another_mpi_than_mpiruns_is_told_at_once() -> None:
    if find_openmpi() is None:
        pytest.skip("no Open MPI on PATH to mix with")
    ended = run("mpich", "well", "0", MPI4PY_MPIABI="openmpi", MPI4PY_LIBMPI="libmpi.so.40")
    assert ended.code == 2
    assert only_error(ended).startswith("error: mpirun says worker 0 of 2 (PMI_RANK, PMI_SIZE), but mpi4py's Open MPI")
    assert f"{BESIDE_PYTHON / 'mpirun'}" in only_error(ended)


def test_an_mpi_library_that_cannot_be_loaded_is_told_once(tmp_path: Path) -> None:
    ended = run("mpich", "well", "0", MPI4PY_MPIABI="mpich", MPI4PY_LIBMPI=str(tmp_path / "libmpi.so"))
    assert ended.code == 2
    assert only_error(ended).startswith("error: Workers of mpich's mpirun meet through mpi4py, which cannot be used: ")
