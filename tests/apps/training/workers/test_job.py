"""The verdict on a job, by a clock of the test's."""

from typing import Any

import pytest

from apps.training.workers.job import AGREEMENT, SECOND_THOUGHT, SILENT, Job

TIMEOUT = 30.0


def job_of(workers: int, *, up: int | None = None) -> Job:
    job = Job(workers, timeout=TIMEOUT, setting="its.timeout", machine="m")
    for rank in range(workers if up is None else up):
        job.hear(rank, {"host": f"host{rank}", "machine": "m", "pid": 100 + rank})
    return job


def live(job: Job, seconds: float, *, progress: int = 1, what: str = "", **of: Any) -> None:
    """`seconds` in which every worker beats but those in `silent`; those in `waiting` wait; `moving` make progress."""
    for tick in range(round(seconds * 2)):
        for rank in range(job.world_size):
            if rank not in of.get("silent", ()):
                at = progress + (tick if rank in of.get("moving", ()) else 0)
                doing = what or f"step {progress}"
                job.hear(rank, {"progress": at, "what": doing, "waiting": rank in of.get("waiting", ())})
        job.advance(0.5)


def failure(line: str, code: int = 1, trace: str = "", said: bool = False) -> dict[str, Any]:
    return {"failure": {"line": line, "code": code, "trace": trace, "said": said}}


def text(job: Job) -> str:
    verdict = job.verdict()
    assert verdict is not None
    return verdict.text


def test_all_is_well_while_workers_move_or_wait_for_one_that_moves() -> None:
    job = job_of(3)
    live(job, 10 * TIMEOUT, moving=[0], waiting=[1, 2])
    assert job.verdict() is None


def test_the_worker_to_blame_is_the_one_that_does_not_wait() -> None:
    job = job_of(3)
    live(job, TIMEOUT, waiting=[0, 2], what="reading rows of step 17")
    assert job.verdict() is None
    live(job, 2, waiting=[0, 2], what="reading rows of step 17")
    assert text(job) == (
        "error: Worker 1 of 3 (host1, process 101) has made no progress for 30 s: reading rows of step 17. "
        "Raise its.timeout if it needs longer."
    )
    assert job.verdict().code == 1  # type: ignore[union-attr]


def test_a_worker_without_a_sign_of_life_is_to_blame_also_when_it_said_it_waits() -> None:
    job = job_of(3)
    live(job, 1, waiting=[0, 1, 2])
    live(job, TIMEOUT + 2, waiting=[0, 1], silent=[2])
    assert "Worker 2 of 3 (host2, process 102) has shown no sign of life for 30 s: step 1." in text(job)
    assert job.unresponsive() == [("m", 102)]


def test_workers_that_all_wait_are_all_named() -> None:
    job = job_of(2)
    live(job, TIMEOUT + 2, waiting=[0, 1])
    assert text(job).endswith("wait for one another since 30 s: worker 0: step 1; worker 1: step 1.")


def test_a_worker_that_has_left_waits_for_the_others() -> None:
    job = job_of(2)
    job.hear(1, {"left": True})
    live(job, 10 * TIMEOUT, moving=[0], silent=[1])
    assert job.verdict() is None
    assert not job.is_over
    job.hear(0, {"left": True})
    assert job.is_over
    job.lose(1)
    assert job.verdict() is None


def test_a_job_suspended_as_a_whole_does_not_hang() -> None:
    job = job_of(2)
    live(job, 1)
    for _ in range(10_000):
        job.advance(0.5)
    assert job.verdict() is None
    assert job.clock < 1 + SILENT + 1
    live(job, 1)
    assert job.verdict() is None


def test_a_pause_of_the_watch_itself_counts_as_a_second() -> None:
    job = job_of(2)
    job.advance(3600)
    assert job.clock <= 1
    assert job.verdict() is None


def test_workers_that_do_not_come_are_named() -> None:
    job = job_of(4, up=2)
    for _ in range(round(2 * TIMEOUT) + 2):
        job.hear(0, {"progress": 0, "what": "starting", "waiting": True})
        job.advance(0.5)
    assert (
        "2 of 4 workers have not come up within 30 s: worker 2, 3. Look at their hosts, or raise its.timeout."
        in text(job)
    )


def test_a_lost_connection_is_a_lost_worker() -> None:
    job = job_of(4)
    live(job, 1, what="reading rows of step 17")
    job.lose(3)
    assert text(job) == (
        "error: Worker 3 of 4 (host3, process 103) is gone without a word, as when it is killed or out of memory; "
        "last heard of at: reading rows of step 17."
    )


def test_the_broken_connections_that_a_death_causes_are_not_the_reason() -> None:
    job = job_of(3)
    job.hear(0, failure("RuntimeError: Connection closed by peer"))
    assert job.verdict() is None
    job.lose(2)
    assert "Worker 2 of 3" in text(job)


def test_a_bug_comes_with_its_traceback() -> None:
    job = job_of(2)
    job.hear(1, failure("KeyError: 'x'", trace="Traceback …\nKeyError: 'x'\n"))
    job.advance(SECOND_THOUGHT + 0.1)
    assert text(job) == "Traceback …\nKeyError: 'x'\nerror: Worker 1 of 2 (host1): KeyError: 'x'"


@pytest.mark.parametrize("first", [0, 1])
def test_the_same_mistake_in_all_workers_is_everybodys(first: int) -> None:
    job = job_of(2)
    job.hear(first, failure("No such file.", code=2))
    if first:
        job.advance(AGREEMENT / 2)
        assert job.verdict() is None
        job.hear(0, failure("No such file.", code=2))
    assert job.verdict().text == "error: No such file."  # type: ignore[union-attr]
    assert job.verdict().code == 2  # type: ignore[union-attr]


def test_a_mistake_in_one_worker_alone_names_it() -> None:
    job = job_of(3)
    job.hear(2, failure("No such file.", code=2))
    for _ in range(5):
        job.advance(0.5)
    assert text(job) == "error: Worker 2 of 3 (host2): No such file."


def test_what_has_been_said_is_not_said_again() -> None:
    job = job_of(2)
    job.hear(0, failure("No such file.", code=2, said=True))
    assert (text(job), job.verdict().code) == ("", 2)  # type: ignore[union-attr]


def test_workers_on_their_way_are_waited_for_a_moment_to_hear_it() -> None:
    job = job_of(2, up=1)
    job.hear(0, failure("No such file.", code=2, said=True))
    job.advance(AGREEMENT / 2)
    assert job.verdict() is None
    job.advance(AGREEMENT / 2 + 0.1)
    assert job.verdict() is not None


def test_an_interrupt_is_no_error() -> None:
    job = job_of(2)
    job.hear(1, failure("interrupted", code=130))
    job.advance(SECOND_THOUGHT + 0.1)
    assert (text(job), job.verdict().code) == ("interrupted", 130)  # type: ignore[union-attr]
