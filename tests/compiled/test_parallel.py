"""Lowering many regions side by side; the compiler itself is replaced by one that writes who did what."""

import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

from compiled import lowering, parallel
from compiled.capture import Captured, capture_function
from compiled.regions import RegionSpec


def make_regions(count: int) -> dict[str, Captured]:
    """Regions of 1, 2, … nodes."""

    def chain(length: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        def run(x: Tensor) -> tuple[Tensor, ...]:
            for _ in range(length):
                x = x * 2
            return (x,)

        return run

    with lowering.fake_mode():
        x = torch.empty(2)
    return {f"r{n}": capture_function(f"r{n}", chain(n), {"x": x}, ["y"]) for n in range(1, count + 1)}


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(graph: GraphModule, inputs: Sequence[Tensor], device_type: str, path: Path, debug: Path | None) -> int:
        nodes = sum(node.op == "call_function" for node in graph.graph.nodes)
        if nodes == 13:
            raise RuntimeError("no compiler found")
        time.sleep(0.1)
        path.write_text(f"{os.getpid()} {device_type} {torch.get_num_threads()} {debug}")
        return 10 * nodes

    monkeypatch.setattr(lowering, "lower", lower)


def lower(
    regions: dict[str, Captured], folder: Path, device_type: str = "cpu", workers: int | None = 2
) -> list[tuple[str, int, int]]:
    """Lower into `folder`; returns the reports as (name, done, total)."""
    reports: list[tuple[str, int, int]] = []

    def report(spec: RegionSpec, done: int, total: int) -> None:
        reports.append((spec.name, done, total))

    parallel.lower_all(regions, device_type, folder, workers, None, report)
    return reports


@pytest.mark.usefixtures("fake_compiler")
@pytest.mark.parametrize("workers", [1, 2, 9, None])
def test_every_region_is_lowered_into_a_file_of_its_name(tmp_path: Path, workers: int | None) -> None:
    regions = make_regions(4)
    reports = lower(regions, tmp_path, workers=workers)
    assert {path.name for path in tmp_path.iterdir()} == regions.keys()
    assert {name for name, _, _ in reports} == regions.keys()
    assert [(done, total) for _, done, total in reports] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for region in regions.values():
        assert region.spec.kernels == 10 * region.spec.nodes
        assert region.spec.seconds >= 0.1


@pytest.mark.usefixtures("fake_compiler")
def test_workers_are_processes_of_one_thread_that_take_the_smallest_region_last(tmp_path: Path) -> None:
    lower(make_regions(6), tmp_path, workers=2)
    told = {path.name: path.read_text().split() for path in tmp_path.iterdir()}
    assert len({pid for pid, *_ in told.values()}) == 2
    assert str(os.getpid()) not in {pid for pid, *_ in told.values()}
    assert {threads for _, _, threads, _ in told.values()} == {"1"}
    order = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert {path.name for path in order[-2:]} <= {"r1", "r2", "r3"}


@pytest.mark.usefixtures("fake_compiler")
def test_a_process_that_uses_cuda_does_not_fork(tmp_path: Path) -> None:
    lower(make_regions(3), tmp_path, device_type="cuda", workers=3)
    assert {path.read_text().split()[0] for path in tmp_path.iterdir()} == {str(os.getpid())}


@pytest.mark.usefixtures("fake_compiler")
@pytest.mark.parametrize("workers", [1, 2])
def test_the_compilers_error_reaches_the_caller(tmp_path: Path, workers: int) -> None:
    regions = make_regions(13)
    with pytest.raises(RuntimeError, match="no compiler found"):
        lower({"bad": regions["r13"], "good": regions["r1"]}, tmp_path, workers=workers)
    assert parallel._work is None


@pytest.mark.usefixtures("fake_compiler")
def test_each_region_has_a_debug_folder_of_its_own(tmp_path: Path) -> None:
    parallel.lower_all(make_regions(2), "cpu", tmp_path, 2, tmp_path / "debug", lambda spec, done, total: None)
    assert {path.read_text().split()[-1] for path in tmp_path.iterdir()} == {
        str(tmp_path / "debug" / name) for name in ("r1", "r2")
    }


def running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def slow_compiler(folder: Path) -> Callable[..., int]:
    """Starts a long process as a compiler would and waits for it; `folder/NAME.pids` tells who works."""

    def lower(graph: GraphModule, inputs: Sequence[Tensor], device_type: str, path: Path, debug: Path | None) -> int:
        with subprocess.Popen(["sleep", "60"]) as compiler:
            (folder / f"{path.name}.tmp").write_text(f"{os.getpid()} {compiler.pid}")
            (folder / f"{path.name}.tmp").rename(folder / f"{path.name}.pids")
        return 0

    return lower


def test_the_compilers_temporary_files_lie_in_the_folder_that_goes_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lower(graph: GraphModule, inputs: Sequence[Tensor], device_type: str, path: Path, debug: Path | None) -> int:
        path.write_text(subprocess.check_output(["mktemp", "-u"], text=True))
        return 0

    monkeypatch.setattr(lowering, "lower", lower)
    parallel.lower_all(make_regions(2), "cpu", tmp_path, 2, None, lambda spec, done, total: None)
    assert {Path((tmp_path / name).read_text()).parent for name in ("r1", "r2")} == {tmp_path}


def pids(folder: Path) -> list[int]:
    return [int(pid) for file in folder.glob("*.pids") for pid in file.read_text().split()]


def test_ctrl_c_ends_workers_and_their_compilers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "lower", slow_compiler(tmp_path))

    def interrupt(futures: object) -> Iterator[Any]:
        assert wait_until(lambda: len(pids(tmp_path)) == 4)
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(parallel, "as_completed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lower(make_regions(5), tmp_path, workers=2)
    assert len(pids(tmp_path)) == 4  # nobody took up another region
    assert wait_until(lambda: not any(map(running, pids(tmp_path))), seconds=5)


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "lower", slow_compiler(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns when a process with threads forks
        parent = os.fork()
    if not parent:
        try:
            lower(make_regions(3), tmp_path, workers=2)
        finally:
            os._exit(1)
    try:
        assert wait_until(lambda: len(pids(tmp_path)) == 4)
        os.kill(parent, signal.SIGTERM)
        assert wait_until(lambda: not any(map(running, pids(tmp_path))))
    finally:
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
