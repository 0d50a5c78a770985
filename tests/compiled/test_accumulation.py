"""Gradients of microbatches: their sums against float64, pairs that the update adds, groups without gradients."""

import pytest
import torch
from torch import Tensor

from compiled.accumulation import Accumulation, accumulation_dtype, total
from compiled.reduction import addend


def gradients(*seeds: int, dtype: torch.dtype = torch.bfloat16) -> list[dict[str, Tensor]]:
    def one(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(5, 7, generator=generator).to(dtype) for name in ("q_proj.weight", "norm.weight")}

    return [one(seed) for seed in seeds]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_microbatches_are_summed_in_at_least_float32(dtype: torch.dtype) -> None:
    parts = gradients(1, 2, 3, 4, dtype=dtype)
    kept = [{name: each.clone() for name, each in part.items()} for part in parts]
    sums = Accumulation()
    for part in parts[:-1]:
        sums.add(0, part)
    found = sums.finish(0, parts[-1])
    for name, value in found.items():
        assert value.dtype == accumulation_dtype(dtype) == torch.promote_types(dtype, torch.float32)
        expected = torch.stack([part[name].double() for part in kept]).sum(0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_that_lie_in_one_memory_are_summed_each(dtype: torch.dtype) -> None:
    """The same tensor, another view of it, a part of it; neighbours in one memory stay there."""
    parts = []
    for whole in (torch.arange(42, dtype=dtype).view(6, 7), torch.ones(6, 7, dtype=dtype)):
        rows, more = torch.cat([whole, whole]).split(6)
        parts.append({"a": whole, "b": whole, "turned": whole.t(), "part": whole[2:4], "rows": rows, "more": more})
    expected = {name: parts[0][name].float() + 2 * parts[1][name].float() for name in parts[0]}
    strides = {name: each.stride() for name, each in parts[0].items()}
    sums = Accumulation()
    sums.add(0, parts[0])
    sums.add(0, parts[1])
    found = sums.finish(0, parts[1])
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name])
        assert value.stride() == strides[name]
    if dtype == torch.float32:
        assert found["rows"].untyped_storage().data_ptr() == found["more"].untyped_storage().data_ptr()


def test_one_microbatch_stays_as_it_is() -> None:
    (only,) = gradients(1)
    assert Accumulation().finish(0, only) is only


def test_two_are_left_to_the_update() -> None:
    first, second = gradients(1, 2)
    pairs = Accumulation(leaves_pairs=True)
    pairs.add(3, first)
    found = pairs.finish(3, second)
    assert set(found) == {*first, *map(addend, first)}
    for name in first:
        assert found[name] is first[name]
        assert found[addend(name)] is second[name]


def test_groups_do_not_mix_and_are_forgotten_when_finished() -> None:
    a, b, c, d = gradients(1, 2, 3, 4, dtype=torch.float64)
    sums = Accumulation()
    sums.add(0, a)
    sums.add(1, b)
    name = "q_proj.weight"
    torch.testing.assert_close(sums.finish(1, c)[name], gradients(2, dtype=torch.float64)[0][name] + c[name])
    torch.testing.assert_close(sums.finish(0, d)[name], gradients(1, dtype=torch.float64)[0][name] + d[name])
    assert sums.finish(0, d) is d


def test_a_frozen_group_has_no_gradients() -> None:
    sums = Accumulation()
    sums.add(0, {})
    sums.add(0, {})
    assert sums.finish(0, {}) == {}


def test_losses_are_added_up() -> None:
    loss = torch.tensor([1.0, 2.0])
    assert total([loss]) is loss
    assert total([loss, loss, 2 * loss]).tolist() == [4.0, 8.0]
