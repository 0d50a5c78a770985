"""Numbers on their way from the device."""

from __future__ import annotations

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
