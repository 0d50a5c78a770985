"""Attribution in made-up traces: kernels by the calls that launched them, overlaps, what lies between."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from apps.profiling.names import BETWEEN, COLLECTIVES, STEP
from apps.profiling.trace import Profile, Span, read_events, read_trace, shares_of_time


def event(category: str, name: str, begin: float, end: float, **arguments: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": begin,
        "dur": end - begin,
        "pid": 1,
        "tid": 1,
        "args": arguments,
    }


def launched(name: str, at: float, begin: float, end: float, number: int, kind: str = "kernel") -> list[dict[str, Any]]:
    """A kernel that runs from `begin` to `end`, launched by the host at `at`."""
    call = event("cuda_driver" if number % 2 else "cuda_runtime", "launch", at, at + 1, correlation=number)
    return [call, event(kind, name, begin, end, correlation=number, stream=7)]


# One step on the host, [0, 100]; its kernels run from 50 to 200, long after they were launched.
ON_GPU = [
    event("user_annotation", STEP, 0, 100),
    event("user_annotation", "region block", 10, 30),
    event("gpu_user_annotation", "region block", 50, 120),
    event("user_annotation", COLLECTIVES, 30, 40),
    event("user_annotation", "region block", 40, 60),
    event("cpu_op", "aten::mm", 41, 45),
    *launched("copy", 5, 50, 60, 1, "gpu_memcpy"),
    *launched("product", 12, 60, 90, 2),
    *launched("sum", 20, 90, 100, 3),
    *launched("nccl", 32, 95, 150, 4),
    *launched("product", 42, 120, 140, 5),
    *launched("loss", 70, 190, 200, 6),
    *launched("warm-up", 110, 300, 400, 7),  # after the step
    event("kernel", "of a lost call", 210, 220, correlation=99),
    {"ph": "M", "name": "process_name", "args": {}},
]


def test_a_kernel_belongs_to_the_label_around_its_launch() -> None:
    profile = read_events(ON_GPU)
    assert profile.on_gpu
    assert profile.seconds == pytest.approx(150e-6)
    assert [(part.name, part.calls) for part in profile.parts] == [
        (BETWEEN, 0),
        ("block", 2),
        (COLLECTIVES, 1),
    ]
    between, block, collectives = profile.parts
    assert block.kernels == pytest.approx({"product": 50e-6, "sum": 10e-6})
    assert list(block.kernels) == ["product", "sum"]
    assert between.kernels == pytest.approx({"copy": 10e-6, "loss": 10e-6})
    assert (block.seconds, block.busy) == pytest.approx((60e-6, 60e-6))
    # of 55 µs of sums, 5 lie under the kernel before and 20 under the one behind
    assert (collectives.seconds, collectives.busy) == pytest.approx((30e-6, 55e-6))
    assert profile.idle == pytest.approx(40e-6)


def test_the_mean_of_several_steps() -> None:
    shifted = [each | {"ts": each["ts"] + 150} for each in ON_GPU if "ts" in each]
    for each in shifted:
        each["args"] = {key: value + 1000 if key == "correlation" else value for key, value in each["args"].items()}
    one, two = read_events(ON_GPU), read_events([*ON_GPU, *shifted])
    assert two.seconds == pytest.approx(one.seconds)
    assert [part.calls for part in two.parts] == [part.calls for part in one.parts]
    assert adds_up(two)


def test_on_a_cpu_a_part_has_the_time_of_its_label_and_the_operators_nobody_else_called() -> None:
    profile = read_events(
        [
            event("user_annotation", STEP, 0, 100),
            event("user_annotation", "region embed", 10, 40),
            event("cpu_op", "aten::zeros", 12, 20),
            event("cpu_op", "aten::empty", 13, 15),
            event("cpu_op", "aten::mm", 20, 30),
            event("user_annotation", "region head", 50, 90),
            event("cpu_op", "aten::add", 95, 99),
        ]
    )
    assert not profile.on_gpu
    assert [(part.name, round(part.seconds * 1e6)) for part in profile.parts] == [("embed", 30), ("head", 40)]
    assert profile.parts[0].kernels == pytest.approx({"aten::mm": 10e-6, "aten::zeros": 8e-6})
    assert list(profile.parts[0].kernels) == ["aten::mm", "aten::zeros"]
    assert profile.idle == pytest.approx(30e-6)


def test_of_several_at_once_the_region_has_the_time() -> None:
    spans = [Span("", 0, 10, COLLECTIVES), Span("", 2, 6, BETWEEN), Span("", 4, 8, "b"), Span("", 5, 9, "a")]
    shares, idle = shares_of_time(spans, 0, 12)
    assert shares == {COLLECTIVES: 3, BETWEEN: 2, "b": 4, "a": 1}
    assert idle == 2


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_file_may_be_packed(tmp_path: Path, name: str) -> None:
    content = json.dumps({"traceEvents": ON_GPU}).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_trace(tmp_path / name) == read_events(ON_GPU)


def adds_up(profile: Profile) -> bool:
    return sum(part.seconds for part in profile.parts) + profile.idle == pytest.approx(profile.seconds)
