"""What becomes of gradients on their way; several processes are in tests/compiled/test_many_workers.py."""

import pytest
import torch
import torch.distributed as dist

from apps.training.workers.bucket import Bucket, TouchedRows
from tests.apps.training.workers.test_reducer import alone  # noqa: F401

EVERYTHING_IS_COPIED = 2**30


def through(bucket: Bucket, as_they_are: int = EVERYTHING_IS_COPIED) -> dict[int, dict[str, torch.Tensor]]:
    bucket.send(dist.group.WORLD, as_they_are)
    return dict(bucket.receive())


@pytest.mark.usefixtures("alone")
def test_small_tensors_travel_as_one_copy_and_large_ones_as_they_are() -> None:
    large, small = torch.arange(100.0), [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    bucket = Bucket(None, None)
    bucket.add(1, {"large": large, "first": small[0]})
    bucket.add(0, {"second": small[1]})
    assert bucket.nbytes == 4 * 103
    found = through(bucket, as_they_are=400)
    assert len(bucket.works) == 2
    assert found[1]["large"].data_ptr() == large.data_ptr()
    copies = [found[1]["first"], found[0]["second"]]
    assert copies[0].untyped_storage().data_ptr() == copies[1].untyped_storage().data_ptr()
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, small, strict=True))


@pytest.mark.usefixtures("alone")
def test_a_large_tensor_of_another_dtype_or_order_is_copied() -> None:
    narrow, turned = torch.ones(100, dtype=torch.bfloat16), torch.arange(100.0).view(10, 10).t()
    bucket = Bucket(None, None)
    bucket.add(0, {"narrow": narrow, "turned": turned})
    found = through(bucket, as_they_are=1)[0]
    assert len(bucket.works) == 1
    assert torch.equal(found["narrow"], narrow.float())
    assert torch.equal(found["turned"], turned)
    assert found["turned"].is_contiguous()


@pytest.mark.usefixtures("alone")
def test_one_tensor_under_two_names_is_not_summed_twice() -> None:
    both = torch.ones(100)
    bucket = Bucket(None, None)
    bucket.add(0, {"a": both, "b": both})
    found = through(bucket, as_they_are=1)[0]
    assert len({tensor.data_ptr() for tensor in (both, found["a"], found["b"])}) == 3


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_travel_alone_and_come_back_among_zeros(dtype: torch.dtype) -> None:
    gradient = torch.zeros(10, 3, dtype=dtype)
    rows = torch.tensor([7, 2])
    gradient[rows] = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=dtype)
    touched = TouchedRows([torch.tensor([[7, 7]]), torch.tensor([2])], 10, dist.group.WORLD).few()
    assert touched is not None
    assert touched.tolist() == [2, 7]
    bucket = Bucket(None, None)
    bucket.add(4, {"weight": gradient}, touched)
    assert bucket.nbytes == 2 * 3 * 4
    found = through(bucket)[4]["weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, gradient.float())


@pytest.mark.usefixtures("alone")
def test_more_than_half_of_the_rows_are_no_few() -> None:
    assert TouchedRows([torch.tensor([0, 1, 2])], 6, dist.group.WORLD).few() is not None
    assert TouchedRows([torch.tensor([0, 1, 2, 3])], 6, dist.group.WORLD).few() is None


def test_a_bucket_without_gradients_sends_nothing() -> None:
    bucket = Bucket(None, None)
    bucket.add(3, {})
    assert through(bucket) == {3: {}}
    assert bucket.works == []
