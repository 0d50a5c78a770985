"""The stream writer against the safetensors library: its reader takes every file, and finds the same bits."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from apps.training.checkpointing.tensor_file import CHUNK, DTYPES, HostBytes, write_file, write_tensors


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype: NaNs and infinities too; scalars and empty ones."""
    dtype = draw(st.sampled_from(sorted(DTYPES, key=str)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = torch.Size(shape).numel() * dtype.itemsize
    values = draw(st.binary(min_size=count, max_size=count))
    if dtype == torch.bool:
        values = bytes(value & 1 for value in values)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(values), dtype=torch.uint8).view(dtype).reshape(shape)


NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensors") / "file.safetensors"


@given(given=st.dictionaries(NAMES, tensors(), max_size=5), metadata=st.none() | st.dictionaries(NAMES, NAMES))
def test_the_library_reads_what_was_written(path: Path, given: dict[str, Tensor], metadata: dict[str, str]) -> None:
    facts = write_tensors(path, given, HostBytes(), metadata)
    content = path.read_bytes()
    assert (facts.bytes, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    found = load(content)
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found[name]) == bits(tensor)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == (metadata or {})


@given(given=st.dictionaries(NAMES, tensors(), min_size=1, max_size=5))
def test_every_tensor_begins_at_a_multiple_of_its_width(path: Path, given: dict[str, Tensor]) -> None:
    write_tensors(path, given, HostBytes())
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert (8 + length) % 8 == 0
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert entry["data_offsets"][0] % given[name].element_size() == 0


def test_pieces_are_joined_in_order(path: Path) -> None:
    large = torch.arange(CHUNK // 8 * 3 + 5)  # three whole pieces and a rest
    write_tensors(path, {"large": large}, HostBytes())
    assert torch.equal(load(path.read_bytes())["large"], large)


def test_a_write_that_takes_less_than_it_is_given_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a raw file may; the rest has to follow."""

    class Reluctant:
        def __init__(self, file: object) -> None:
            self.file = file

        def write(self, data: memoryview) -> int:
            return self.file.write(data[:3])  # type: ignore[attr-defined,no-any-return]

        def __enter__(self) -> "Reluctant":
            return self

        def __exit__(self, *args: object) -> None:
            self.file.close()  # type: ignore[attr-defined]

        def fileno(self) -> int:
            return self.file.fileno()  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr("builtins.open", lambda *args, real=open, **rest: Reluctant(real(*args, **rest)))
    facts = write_file(path, [b"0123456789", memoryview(b"abcdef")])
    assert path.read_bytes() == b"0123456789abcdef"
    assert facts.bytes == 16


def test_nothing_is_copied_on_the_way() -> None:
    tensor = torch.zeros(4)
    (part,) = HostBytes()(tensor)
    tensor[0] = 1.0
    assert bytes(part) == bits(tensor)


def test_bytes_are_hashed_and_written_while_others_run(path: Path) -> None:
    """Python's lock is free in between: another thread takes many turns while one file of 64 MiB is written."""
    import threading

    turns, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            turns[0] += 1
            stop.wait(0.001)

    def parts() -> Iterator[memoryview]:
        yield from HostBytes()(torch.zeros(2**24))

    thread = threading.Thread(target=count)
    thread.start()
    before = turns[0]
    write_file(path, parts())
    during = turns[0] - before
    stop.set()
    thread.join()
    assert during >= 5
