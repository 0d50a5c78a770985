"""Whether operators made of Triton kernels may stand for plain ones.

They do while a region is traced for a GPU. Eager code stays op for op what it is compared with.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_captures: list[None] = []


@contextmanager
def kernels_in_capture() -> Iterator[None]:
    """Inside, `takes_kernels` says yes to tensors on a GPU."""
    _captures.append(None)
    try:
        yield
    finally:
        _captures.pop()


def takes_kernels(x: Tensor) -> bool:
    """Whether what is computed from `x` may be an operator made of Triton kernels."""
    return bool(_captures) and x.is_cuda
