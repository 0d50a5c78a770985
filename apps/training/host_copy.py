"""Numbers on their way from the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """A copy on the host, made right behind the work that makes `tensor` and ahead of any later work."""

    def __init__(self, tensor: Tensor) -> None:
        self.done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()
        else:
            self.values = tensor.clone()

    def read(self) -> Tensor:
        """The copy, once the device has made it."""
        if self.done is not None:
            self.done.synchronize()
        return self.values


class HostScalars:
    """Copies of 0-d tensors by name; those that are None are left out."""

    def __init__(self, scalars: Mapping[str, Tensor | None]) -> None:
        given = {name: scalar.detach().double() for name, scalar in scalars.items() if scalar is not None}
        self.names, self.values = tuple(given), HostCopy(torch.stack(list(given.values())))

    def read(self) -> dict[str, float]:
        """The numbers, once the device has made them."""
        return dict(zip(self.names, self.values.read().tolist(), strict=True))
