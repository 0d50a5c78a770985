"""New state of a step, however its parts are dealt out: the same minima, maxima and means."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compiled.reduction import OneWorker
from compiled.statistics import Statistics

REDUCE = {"least": "min", "most": "max", "mean": "mean", "step": "max"}
ENTRY = {"state": {name: f"layer.{name}" for name in REDUCE}, "reduce": REDUCE}


def outputs(row: np.ndarray) -> dict[str, Tensor]:
    new = {f"new_{name}": torch.tensor(row, dtype=torch.float32) for name in ("least", "most", "mean")}
    return new | {"new_step": torch.tensor(int(row.sum()) % 97)}


def targets() -> dict[str, Tensor]:
    buffers = {f"layer.{name}": torch.zeros(2) for name in ("least", "most", "mean")}
    return buffers | {"layer.step": torch.zeros((), dtype=torch.int64)}


class Together(OneWorker):
    """Stands in for the other worker: its flat tensors were recorded, or are being recorded now."""

    is_alone = False

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__()
        self.others, self.seen = others, []

    def max_(self, tensor: Tensor) -> Tensor:
        self.seen.append(tensor.clone())
        return torch.maximum(tensor, self.others.pop(0)) if self.others else tensor

    def sum_(self, tensor: Tensor) -> Tensor:
        self.seen.append(tensor.clone())
        return tensor + self.others.pop(0) if self.others else tensor


rows = st.lists(st.lists(st.integers(-50, 50), min_size=2, max_size=2), min_size=1, max_size=5)


@settings(deadline=None)
@given(mine=rows, theirs=rows)
def test_parts_and_workers_make_one(mine: list[list[int]], theirs: list[list[int]]) -> None:
    other = Together([])
    for share, reducer in ((theirs, other), (mine, Together(other.seen))):
        buffers = targets()
        statistics = Statistics(buffers)
        for row in share:
            statistics.add(ENTRY, outputs(np.array(row)))
        statistics.write(reducer)
    everything = np.array(mine + theirs)
    np.testing.assert_array_equal(buffers["layer.least"], everything.min(0))
    np.testing.assert_array_equal(buffers["layer.most"], everything.max(0))
    np.testing.assert_allclose(buffers["layer.mean"], everything.mean(0), rtol=1e-6, atol=1e-6)
    assert buffers["layer.step"] == max(int(row.sum()) % 97 for row in everything)


def test_one_worker_with_several_parts() -> None:
    buffers = targets()
    statistics = Statistics(buffers)
    for row in ([1, -4], [3, 2], [2, 8]):
        statistics.add(ENTRY, outputs(np.array(row)))
    statistics.write(OneWorker())
    assert buffers["layer.least"].tolist() == [1, -4]
    assert buffers["layer.most"].tolist() == [3, 8]
    assert buffers["layer.mean"].tolist() == [2, 2]


def test_nothing_is_written_before_the_step_is_over_and_nothing_without_parts() -> None:
    buffers = targets()
    statistics = Statistics(buffers)
    statistics.write(OneWorker())
    statistics.add(ENTRY, outputs(np.array([5, 5])))
    assert all(not buffer.any() for buffer in buffers.values())


def test_counters_are_exact_far_beyond_float32() -> None:
    buffers, count = targets(), 2**31 + 1
    statistics = Statistics(buffers)
    statistics.add(ENTRY, outputs(np.array([0, 0])) | {"new_step": torch.tensor(count)})
    statistics.write(Together([]))
    assert buffers["layer.step"].item() == pytest.approx(count, abs=0)


@pytest.mark.parametrize("kind", ["min", "max", "mean"])
def test_two_states_may_come_as_one_tensor(kind: str) -> None:
    buffers = {"layer.a": torch.zeros(2), "layer.b": torch.zeros(2)}
    entry = {"state": {"a": "layer.a", "b": "layer.b"}, "reduce": {"a": kind, "b": kind}}
    statistics = Statistics(buffers)
    for row in ([1.0, 6.0], [4.0, 5.0], [7.0, 1.0]):
        new = torch.tensor(row)
        statistics.add(entry, {"new_a": new, "new_b": new})
        assert new.tolist() == row
    statistics.write(OneWorker())
    expected = {"min": [1.0, 1.0], "max": [7.0, 6.0], "mean": [4.0, 4.0]}[kind]
    assert buffers["layer.a"].tolist() == buffers["layer.b"].tolist() == expected
