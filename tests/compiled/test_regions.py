"""Region specs: what they say of a tensor, how they travel as JSON, what is refused before machine code sees it."""

import json
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from backends.errors import UserError
from compiled.regions import Region, RegionSpec, TensorSpec

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]


@st.composite
def tensors(draw: st.DrawFn, least: int = 0) -> Tensor:
    """Up to four dimensions, some extents 1 or 0, dimensions in any order in memory, some of them steps of 2."""
    shape = draw(st.lists(st.integers(least, 4), max_size=4))
    steps = draw(st.lists(st.sampled_from([1, 2]), min_size=len(shape), max_size=len(shape)))
    order = draw(st.permutations(range(len(shape))))
    full = torch.zeros([shape[i] * steps[i] for i in order], dtype=draw(st.sampled_from(DTYPES)))
    full = full.permute([order.index(i) for i in range(len(shape))])
    return full[tuple(slice(None, None, step) for step in steps)]


def addresses(tensor: Tensor) -> list[int]:
    """The memory offset of every element in order: what a stride is for."""
    found = [0]
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = [base + stride * index for base in found for index in range(extent)]
    return found


@given(tensors())
def test_a_tensor_matches_its_own_spec(tensor: Tensor) -> None:
    assert TensorSpec.of("x", tensor).matches(tensor, "cpu")


@given(tensors(), tensors())
def test_two_tensors_match_exactly_when_machine_code_could_not_tell_them_apart(left: Tensor, right: Tensor) -> None:
    same = left.shape == right.shape and left.dtype == right.dtype and addresses(left) == addresses(right)
    assert TensorSpec.of("x", left).matches(right, "cpu") == same


def test_the_stride_of_an_extent_that_addresses_nothing_may_be_anything() -> None:
    spec = TensorSpec.of("x", torch.zeros(2, 1, 3))
    assert spec.matches(torch.zeros(6).as_strided((2, 1, 3), (3, 77, 1)), "cpu")
    assert not spec.matches(torch.zeros(99).as_strided((2, 1, 3), (77, 3, 1)), "cpu")
    assert TensorSpec.of("x", torch.zeros(0, 3)).matches(torch.zeros(3, 0).t(), "cpu")


@given(tensors(least=2), st.data())
def test_any_change_of_shape_dtype_stride_or_device_is_seen(tensor: Tensor, data: st.DataObject) -> None:
    spec = TensorSpec.of("x", tensor)
    assert not spec.matches(tensor, "cuda")
    assert not spec.matches(tensor.to(data.draw(st.sampled_from([d for d in DTYPES if d != tensor.dtype]))), "cpu")
    assert not spec.matches(tensor[None], "cpu")
    assume(tensor.ndim >= 1)
    dim = data.draw(st.integers(0, tensor.ndim - 1))
    assert not spec.matches(tensor.narrow(dim, 0, tensor.shape[dim] - 1), "cpu")
    # same shape, elements twice as far apart
    apart = torch.zeros([extent * 2 for extent in tensor.shape], dtype=tensor.dtype)[
        (slice(None, None, 2),) * tensor.ndim
    ]
    assert spec.matches(apart, "cpu") == (addresses(apart) == addresses(tensor))


@given(tensors())
def test_bytes_are_those_of_the_elements(tensor: Tensor) -> None:
    assert TensorSpec.of("x", tensor).bytes == tensor.numel() * tensor.element_size()


def make_spec() -> RegionSpec:
    return RegionSpec(
        "double",
        [TensorSpec.of("x", torch.zeros(2, 3)), TensorSpec.of("sum", torch.zeros(3).double())],
        [TensorSpec.of("output", torch.zeros(2, 3)), TensorSpec.of("saved_0", torch.zeros(4).bfloat16())],
        mutated=["sum"],
        flops=12,
        nodes=3,
        kernels=1,
        seconds=0.5,
        file="regions/double",
        sha256="ab" * 32,
    )


def test_a_spec_survives_json() -> None:
    spec = make_spec()
    assert RegionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_region_counts_every_tensor_once_and_knows_what_it_saves() -> None:
    spec = make_spec()
    assert spec.bytes == 24 + 24 + 24 + 8
    assert spec.to_json()["bytes"] == spec.bytes
    assert spec.saved_bytes == 8


def region() -> Region:
    return Region(make_spec(), lambda tensors: [tensors[0] * 2, tensors[1]])


def test_a_region_runs_its_code_on_the_tensors_in_order() -> None:
    doubled, total = region()([torch.ones(2, 3), torch.zeros(3).double()])
    assert torch.equal(doubled, torch.full((2, 3), 2.0))
    assert torch.equal(total, torch.zeros(3).double())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([torch.zeros(2, 3)], r"'double' takes 2 tensors, got 1"),
        ([torch.zeros(3, 2), torch.zeros(3).double()], r"expects x as float32\[2, 3\] .* got float32\[3, 2\]"),
        ([torch.zeros(3, 2).t(), torch.zeros(3).double()], r"stride \[3, 1\] on cpu, got .* stride \[1, 2\]"),
        ([torch.zeros(2, 3), torch.zeros(3)], r"expects sum as float64\[3\] .* got float32\[3\]"),
    ],
    ids=["count", "shape", "stride", "dtype"],
)
def test_the_check_names_what_differs_and_both_sides(tensors: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        region().check(tensors, "cpu")


def test_the_check_passes_what_fits_and_names_the_device_that_does_not() -> None:
    fitting = [torch.zeros(2, 3), torch.zeros(3).double()]
    region().check(fitting, "cpu")
    with pytest.raises(UserError, match=r"on cuda, got .* on cpu"):
        region().check(fitting, "cuda")
