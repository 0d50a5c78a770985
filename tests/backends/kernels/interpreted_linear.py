"""The linear's kernels in Triton's interpreter against the plain torch twin and float64: one JSON line a case.

    TRITON_INTERPRET=1 python -m tests.backends.kernels.interpreted_linear

A program of its own, because Triton reads that variable once, when a kernel is made. Both sides multiply the same
float16 values; the interpreter cuts a float32 off where a GPU rounds it to bfloat16.
"""

import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backends.kernels import optical_linear as twin
from backends.kernels import optical_linear_cuda as kernels
from backends.kernels.optical_product import Converters
from tests.backends.kernels.test_optical_linear import allowed_error

KNOWN = (-2.5, 2.7, -0.7, 0.6, -9.0, 11.0)  # x, w, out; all cut some of the values
UNKNOWN = (math.inf, -math.inf) * 3
HALF, BFLOAT16 = torch.float16, torch.bfloat16


class Case(NamedTuple):
    shape: tuple[int, ...]  # of x
    columns: int
    dtype: torch.dtype = HALF
    bias: bool = False
    ranges: tuple[float, ...] = KNOWN
    input_levels: int = 256
    output_levels: int = 256
    lut_min: float | None = 0.020040
    broken: float = 0.0


CASES = {
    "whole blocks": Case((16, 32), 24),
    "odd sizes": Case((7, 33), 19),
    "one token": Case((1, 40), 5, bias=True),
    "a vector": Case((40,), 5),
    "batch": Case((3, 5, 17), 13, bias=True),
    "bfloat16": Case((2, 9, 33), 21, BFLOAT16, bias=True),
    "few levels": Case((6, 33), 20, input_levels=5, output_levels=3),
    "many levels in": Case((6, 33), 20, input_levels=4096, lut_min=None),
    "ranges unknown": Case((6, 33), 20, bias=True, ranges=UNKNOWN),
    "only out known": Case((6, 33), 20, ranges=(*UNKNOWN[:4], *KNOWN[4:])),
    "range of nothing": Case((6, 33), 20, ranges=(0.0, 0.0, *KNOWN[2:])),
    "narrow ranges": Case((6, 33), 20, ranges=(-2e-5, 3e-5, *KNOWN[2:4], -4e-5, 3e-5)),
    "NaN": Case((6, 33), 20, broken=math.nan),
    "infinity": Case((6, 33), 20, broken=-math.inf),
}


def compute(case: Case) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """y, ranges seen, and what went in."""
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(case.shape, generator=generator), torch.randn(case.columns, case.shape[-1], generator=generator)
    b = torch.randn(case.columns, generator=generator).to(case.dtype) if case.bias else None
    x, w = x.to(case.dtype), (0.3 * w).to(case.dtype)
    if case.broken:
        x.view(-1, case.shape[-1])[-2, 3] = case.broken
    ranges = tuple(torch.tensor(end) for end in case.ranges)
    converters = Converters(case.input_levels, case.output_levels, case.lut_min, None, None, 2**40 + 7)
    step, first_row = torch.tensor(5 + (3 << 32)), torch.tensor(2**31)
    y, seen = twin.optical_linear(x, w, b, ranges, step, first_row, converters, observe=True)
    return y, seen, (x, w, b, case.ranges, converters)


def errors(case: Case) -> dict[str, float]:
    twin._has_kernels = lambda *_: True  # type: ignore[assignment]
    y, seen, given = compute(case)
    twin._has_kernels = lambda *_: False  # type: ignore[assignment]
    expected, expected_seen, _ = compute(case)
    level = (case.ranges[5] - case.ranges[4]) / (case.output_levels - 1) if math.isfinite(case.ranges[4]) else 1.0
    there = expected.isfinite()
    steps = (y.double() - expected.double())[there].abs() / level
    found = {
        "largest error in levels": steps.max().item(),
        "share of errors above 0.1 levels": (steps > 0.1).double().mean().item(),
        "other elements are no numbers": (y.isfinite() != there).sum().item(),
        "ranges": max(relative_error(a, b) for a, b in zip(seen, expected_seen, strict=True)),
    }
    if case.ranges is KNOWN and not case.broken:
        exact, allowed = allowed_error(*given)
        found["error against float64 as a part of its bound"] = ((y.double() - exact).abs() / allowed).max().item()
    return found


def relative_error(value: Tensor, expected: Tensor) -> float:
    """0 for equal numbers, infinities and NaN."""
    if torch.equal(value.isfinite(), expected.isfinite()) and not expected.isfinite():
        return float(value.isnan() != expected.isnan())
    return ((value - expected).abs() / expected.abs()).item()


def main() -> None:
    twin.runs_in_half = lambda _: True  # type: ignore[assignment]
    kernels.PROGRAMS, kernels.BLOCK = 3, 64
    for name, case in CASES.items():
        print(json.dumps([name, errors(case)]), flush=True)


if __name__ == "__main__":
    main()
