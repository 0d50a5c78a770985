"""The backward kernel of RMSNorm in Triton's interpreter against float64 and autograd: one JSON line of errors a case.

    TRITON_INTERPRET=1 python -m tests.backends.kernels.interpreted_rms_norm

A program of its own, because Triton reads that variable once, when a kernel is made.
"""

import json

import torch
from torch import Tensor

from backends.kernels import rms_norm as kernels

CASES = {
    # shape, rows of a tile, programs at most, a gradient from the residual stream, the weight is trained
    "one token": ((1, 1, 96), 4, 3, True, True),
    "an odd width": ((7, 33), 2, 3, True, True),
    "whole tiles": ((2, 12, 64), 4, 3, False, True),
    "rows left over": ((2, 13, 65), 4, 2, True, True),
    "a frozen weight": ((2, 5, 40), 1, 3, True, False),
    "width one": ((5, 1), 2, 2, False, True),
}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def errors(case: str, dtype: torch.dtype) -> dict[str, float]:
    shape, rows, programs, has_residual, trains_weight = CASES[case]
    kernels.tiles = lambda _: (rows, 4, programs, 1)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    weight = torch.rand(shape[-1], generator=generator).to(dtype) + 0.5
    scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    kernels.register()
    found = torch.ops.substrate.rms_norm_backward(
        grad, residual if has_residual else None, x, weight, scale, trains_weight
    )
    leaves = (x.double().requires_grad_(), weight.double().requires_grad_())
    expected = list(torch.autograd.grad(norm(*leaves), leaves, grad.double()))
    if has_residual:
        expected[0] += residual.double()
    if not trains_weight:
        assert found[1].numel() == 0
    assert [each.dtype for each in found] == [dtype, dtype]
    pairs = list(zip(("x", "weight"), found, expected, strict=True))[: 1 + trains_weight]
    # in a width of one the gradient is the difference of two equal numbers
    return {name: float((a.double() - b).norm() / b.norm().clamp(min=1.0)) for name, a, b in pairs}


def main() -> None:
    for case in CASES:
        print(json.dumps([case, "float32", errors(case, torch.float32)]), flush=True)
    print(json.dumps(["rows left over", "bfloat16", errors("rows left over", torch.bfloat16)]), flush=True)


if __name__ == "__main__":
    main()
