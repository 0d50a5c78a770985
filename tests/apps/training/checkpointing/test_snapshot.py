"""Copies for a checkpoint: the tensors' values, in memory that the writer reads in few large parts."""

from pathlib import Path

import pytest
from hypothesis import given
from safetensors.torch import load
from torch import Tensor

from apps.training.checkpointing.snapshot import Copies, take_snapshot
from apps.training.checkpointing.tensor_file import HostBytes, write_order, write_tensors
from tests.apps.training.checkpointing.test_tensor_file import NAMES, bits, st, tensors
from tests.apps.training.checkpointing.toys import ToyModel, ToyProgram


class CountingBytes(HostBytes):
    """Counts the parts it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = 0

    def __call__(self, tensor: Tensor):  # type: ignore[no-untyped-def]
        self.parts += 1
        return super().__call__(tensor)


@given(given=st.dictionaries(NAMES, tensors(), max_size=6))
def test_copies_lie_side_by_side_and_are_written_as_they_are(
    tmp_path_factory: pytest.TempPathFactory, given: dict[str, Tensor]
) -> None:
    path = tmp_path_factory.getbasetemp() / "copies.safetensors"
    copies, read = Copies(), CountingBytes()
    copied = copies.copy({name: given[name] for name in write_order(given)})
    write_tensors(path, copied, read)
    assert read.parts == (1 if any(tensor.numel() for tensor in given.values()) else 0)
    found = load(path.read_bytes())
    assert {name: bits(tensor) for name, tensor in found.items()} == {name: bits(each) for name, each in given.items()}
    for tensor in given.values():  # the next snapshot takes the memory over
        tensor.zero_()
    again = copies.copy({name: given[name] for name in write_order(given)})
    for name, tensor in again.items():
        assert tensor is copied[name]
        assert not any(bits(tensor))


def test_a_workers_share_is_read_in_one_part_a_file(tmp_path: Path) -> None:
    model = ToyModel()
    copies, read = Copies(), CountingBytes()
    taken = take_snapshot(1, model, ToyProgram(model), copies, rank=0, world_size=1, is_sharded=False)
    for name, weights in taken.weights.items():
        write_tensors(tmp_path / name, weights, read)
    write_tensors(tmp_path / "own.safetensors", taken.own, read)
    assert read.parts == len(taken.weights) + 1
