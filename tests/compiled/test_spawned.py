"""Processes started from nothing that lower regions; on a CPU here, which the compiler takes as well."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backends.kernels.external import external_call
from compiled import lowering, parallel
from compiled.capture import Captured, capture_function
from compiled.spawned import SpawnedWorkers, Unreadable, compile_threads, modules_of_operators, pickled, unpickled


def region() -> Captured:
    """tanh(x) wᵀ, with an operator of prims among the plain ones."""

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.prims.convert_element_type(torch.tanh(x.float()), torch.float64) @ weight.t(),)

    with lowering.fake_mode():
        x, weight = torch.empty(5, 3, dtype=torch.float64), torch.empty(4, 3, dtype=torch.float64)
    return capture_function("product", run, {"x": x, "weight": weight}, ["y"])


def test_as_many_threads_as_cores_compile() -> None:
    assert compile_threads() == len(os.sched_getaffinity(0))


def test_a_region_is_lowered_in_another_process(tmp_path: Path) -> None:
    others = set(multiprocessing.active_children())
    with SpawnedWorkers(1, "cpu") as workers:
        workers.begin(region())
        ((name, outcome),) = workers.results(tmp_path)
    assert name == "product"
    assert outcome is not None
    assert outcome[0] >= 1
    assert outcome[1] > 0
    x, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    (found,) = lowering.load(tmp_path / "product", "cpu")([x, weight])
    torch.testing.assert_close(found, x.float().tanh().double() @ weight.t(), rtol=1e-6, atol=1e-6)
    assert set(multiprocessing.active_children()) <= others


def test_graph_and_inputs_are_the_same_in_another_process() -> None:
    captured = region()
    graph, inputs = unpickled(pickled(captured), [])
    assert Captured(graph, inputs, captured.spec).identity == captured.identity
    assert [(one.shape, one.dtype, one.stride()) for one in inputs] == [
        (one.shape, one.dtype, one.stride()) for one in captured.inputs
    ]


def test_a_graph_knows_which_modules_define_its_operators() -> None:
    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(external_call([x], "json:dumps", "{}", [2, 2], [], 0, ""))

    with lowering.fake_mode():
        x = torch.empty(2, 2)
    captured = capture_function("call", call, {"x": x}, ["y"])
    assert modules_of_operators(captured.graph) == ["backends.kernels.external"]
    assert modules_of_operators(region().graph) == []


def test_an_operator_of_triton_kernels_is_defined_by_the_module_that_registers_it() -> None:
    pytest.importorskip("triton")
    from backends.kernels import rms_norm

    rms_norm.register()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.substrate.rms_norm_backward.default, (x, x, x, x)))
    assert modules_of_operators(torch.fx.GraphModule({}, graph)) == ["backends.kernels.rms_norm"]


def test_an_operator_nobody_can_find_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="ModuleNotFoundError: No module named 'gone_with_the_wind'"):
        unpickled(pickled(region()), ["gone_with_the_wind"])


def test_what_another_process_cannot_read_is_lowered_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Others:
        count = 2

        def results(self, folder: Path) -> Iterator[tuple[str, tuple[int, float] | None]]:
            yield "known", (7, 0.5)
            yield "unknown", None

    def lower(graph: Any, inputs: Any, device_type: str, path: Path, debug: Path | None) -> int:
        path.write_text("here")
        return 3

    monkeypatch.setattr(lowering, "lower", lower)
    regions = {"known": region(), "unknown": region()}
    for name, each in regions.items():
        each.spec.name = name
    reports: list[tuple[int, int]] = []
    others: Any = Others()
    parallel.lower_all(
        regions, "cuda", tmp_path, None, None, lambda spec, done, total: reports.append((done, total)), others
    )
    assert {name: each.spec.kernels for name, each in regions.items()} == {"known": 7, "unknown": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["unknown"]
    assert reports == [(1, 2), (2, 2)]


def test_an_error_ends_them_at_once() -> None:
    others = set(multiprocessing.active_children())
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), SpawnedWorkers(2, "cpu"):
        raise KeyboardInterrupt
    assert time.monotonic() - started < 8  # they were importing, and had a library to compile
    assert set(multiprocessing.active_children()) <= others


def test_nothing_is_said_when_they_end(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from compiled.spawned import SpawnedWorkers\n"
        "if __name__ == '__main__':\n"
        "    with SpawnedWorkers(1, 'cpu') as workers:\n"
        "        workers._pool.submit(len, '').result()\n"  # behind the warming up, so that it is idle
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout + ran.stderr == ""


def test_what_cannot_leave_this_process_is_lowered_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = region()
    captured.graph.graph.output_node().meta["val"] = (each for each in "no pickle holds a generator")
    with pytest.raises(Unreadable, match="generator"):
        pickled(captured)
    monkeypatch.setattr(lowering, "lower", lambda graph, inputs, device_type, path, debug: path.write_text("here"))
    reports: list[str] = []
    with SpawnedWorkers(1, "cpu") as workers:
        workers.begin(captured)
        parallel.lower_all(
            {"product": captured}, "cpu", tmp_path, None, None, lambda spec, *_: reports.append(spec.name), workers
        )
    assert reports == ["product"]
    assert (tmp_path / "product").read_text() == "here"


def test_a_table_that_a_backend_baked_in_goes_along() -> None:
    captured = capture_function("table", lambda x: (x * torch.tensor([1.0, 2.5, -3.0]),), {"x": fake(3)}, ["y"])
    graph, inputs = unpickled(pickled(captured), [])
    assert Captured(graph, inputs, captured.spec).identity == captured.identity
    tables = [each.tolist() for _, each in graph.named_buffers()] or [
        each.tolist() for each in vars(graph).values() if isinstance(each, Tensor)
    ]
    assert tables == [[1.0, 2.5, -3.0]]


def fake(*shape: int) -> Tensor:
    with lowering.fake_mode():
        return torch.empty(shape)
