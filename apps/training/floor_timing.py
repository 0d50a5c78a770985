"""Single pieces of work, each timed alone: a linear layer's three products, causal attention, a copy of memory."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# That a measurement takes in all, behind a first call that is not counted; a CPU is rarely left alone.
_LEAST_SECONDS = {"cuda": 0.02, "cpu": 0.1}
_REPEATS = (5, 50)
_CACHE_BYTES = 2**28  # more than any device's cache: in a step, operands come from memory
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**27}
# PyTorch's ways to compute attention, of which the fastest counts; on a GPU plain products are for what no other takes.
_WAYS = {
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
}
_SHARES_HEADS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)  # takes fewer key heads than query heads


@dataclass(frozen=True)
class Times:
    """Seconds of forward and backward; `of_weight`: the part of the backward that a frozen weight saves."""

    forward: float
    backward: float
    of_weight: float = 0.0


class Stopwatch:
    """Times repeated runs on `device` in `dtype`; equal shapes are measured once."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._known: dict[tuple[int, ...], Times] = {}

    def product(self, tokens: int, width_in: int, width_out: int) -> Times:
        """x Wᵀ, and backward dy W and dyᵀ x."""
        shape = (tokens, width_in, width_out)
        if shape not in self._known:
            x, weight = self._random(tokens, width_in), self._random(width_out, width_in)
            forward = self._fastest(_ways_of_product(x, weight.t()))
            dy = self._random(tokens, width_out)
            of_input = self._fastest(_ways_of_product(dy, weight))
            of_weight = self._fastest(_ways_of_product(dy.t(), x))
            self._known[shape] = Times(forward, of_input + of_weight, of_weight)
        return self._known[shape]

    def attention(self, batch: int, heads: int, key_heads: int, length: int, head_dim: int) -> Times:
        """Causal attention, heads as the projections lay them out: [batch, length, heads, head_dim]."""
        shape = (batch, heads, key_heads, length, head_dim)
        if shape not in self._known:
            found = [self._attention_by(way, *shape) for way in _WAYS[self.device.type]]
            if not any(found):
                found = [self._attention_by(SDPBackend.MATH, *shape)]
            self._known[shape] = min(filter(None, found), key=lambda each: each.forward + each.backward)
        return self._known[shape]

    @cached_property
    def copy_bytes_per_second(self) -> float:
        """Bytes read and bytes written, both counted, of one large copy."""
        source = torch.zeros(_COPIED_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))

    def seconds(self, work: Callable[[], Any]) -> float:
        """Seconds of `work`: on a GPU the median, with cold caches; on a CPU, which others use too, the least."""
        work()
        on_gpu = self.device.type == "cuda"
        runs = self._runs_on_gpu if on_gpu else _runs_on_cpu
        (first,) = runs(work, 1)
        least, most = _REPEATS
        wanted = _LEAST_SECONDS[self.device.type] / max(first, 1e-9)
        taken = runs(work, int(min(max(wanted, least), most)))
        return median(taken) if on_gpu else min(taken)

    def _runs_on_gpu(self, work: Callable[[], Any], count: int) -> list[float]:
        flushed = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=self.device)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in pairs:
            flushed.zero_()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def _attention_by(
        self, way: SDPBackend, batch: int, heads: int, key_heads: int, length: int, head_dim: int
    ) -> Times | None:
        """None where this way does not take these shapes or this dtype."""
        kept = key_heads if way in _SHARES_HEADS else heads  # others get the keys of each head in a tensor of its own
        q, k, v = (
            self._random(batch, length, each, head_dim).transpose(1, 2).requires_grad_() for each in (heads, kept, kept)
        )

        def forward() -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kept != heads)

        with sdpa_kernel(way), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # why a way is none
            try:
                out = forward()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                return None
            gradient = torch.randn_like(out)
            there = self.seconds(forward)
            back = self.seconds(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True))
        return Times(there, back)

    def _fastest(self, ways: Iterable[Callable[[], Any]]) -> float:
        return min(self.seconds(way) for way in ways)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def _runs_on_cpu(work: Callable[[], Any], count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def _ways_of_product(left: Tensor, right: Tensor) -> list[Callable[[], Tensor]]:
    """left · right by PyTorch's choice of library; on a CPU by oneDNN's linear too, and by the transposed product."""
    ways: list[Callable[[], Tensor]] = [lambda: left @ right]
    if left.device.type == "cpu" and left.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        onednn = torch.ops.mkldnn._linear_pointwise
        ways.append(lambda: onednn(left, right.t(), None, "none", [], ""))
        ways.append(lambda: onednn(right.t(), left, None, "none", [], ""))
    return ways
