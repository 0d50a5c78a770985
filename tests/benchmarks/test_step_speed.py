"""How variants are timed and what is said of them, by variants whose seconds are known."""

from typing import Any

import pytest

from apps.training.reporting.throughput import Efficiency
from benchmarks import step_speed
from benchmarks.step_speed import NO_ROOM, LeftOut, Result, floor_line, in_turns, line

TOKENS = 100
YARDSTICK = Efficiency(flops=1e12, peak=8e12, floor=0.125)


def test_variants_take_turns_and_one_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []

    class Known:
        def __init__(self, name: str, settings: list[str]) -> None:
            if name == "liger":
                raise LeftOut("liger-kernel is not installed")
            self.name = name

        def seconds(self, steps: int) -> float:
            taken.append(self.name)
            return {"substrate": 0.25, "eager": 0.5}[self.name]

        def stop(self) -> None:
            taken.append(f"{self.name} ends")

    monkeypatch.setattr(step_speed, "Variant", Known)
    results = list(in_turns(["substrate", "liger", "eager"], [], 2))
    assert taken == ["substrate", "eager", "substrate", "eager", "substrate ends", "eager ends"]
    assert results == [
        Result("substrate", [0.25, 0.25]),
        Result("liger", [], left_out="liger-kernel is not installed"),
        Result("eager", [0.5, 0.5]),
    ]


def test_a_line_has_speed_shares_and_the_median_ratio() -> None:
    ours, theirs = Result("substrate", [0.25, 0.5, 0.25], 3.0), Result("eager", [0.5, 0.5, 0.5])
    expected: dict[str, Any] = {
        "variant": "substrate",
        "min_ms": 250.0,
        "median_ms": 250.0,
        "tokens_per_s": 400,
        "tflops": 4.0,
        "mfu": 0.5,
        "of_floor": 0.5,
        "peak_gib": 3.0,
    }
    assert line(ours, ours, YARDSTICK, TOKENS) == expected
    assert line(theirs, ours, YARDSTICK, TOKENS)["times_ours"] == 2.0
    assert "times_ours" not in line(theirs, Result("substrate", [], left_out=NO_ROOM), YARDSTICK, TOKENS)
    assert line(Result("eager", [], left_out=NO_ROOM), ours, YARDSTICK, TOKENS) == {
        "variant": "eager",
        "left_out": NO_ROOM,
    }


def test_the_floor_has_a_line_of_its_own() -> None:
    assert floor_line(YARDSTICK, TOKENS)["tokens_per_s"] == 800
    assert floor_line(YARDSTICK, TOKENS)["of_floor"] == 1.0
    assert floor_line(Efficiency(flops=1.0), TOKENS) == {"variant": "floor", "left_out": NO_ROOM}
