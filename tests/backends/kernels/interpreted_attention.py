"""The attention kernels in Triton's interpreter against the plain torch twin: one JSON line of errors a case.

    TRITON_INTERPRET=1 python -m tests.backends.kernels.interpreted_attention

A program of its own, because Triton reads that variable once, when a kernel is made. In float32 both sides do the same
arithmetic up to the order of sums.
"""

import json
import math

import torch
from torch import Tensor

from backends.kernels import optical_attention as twin
from backends.kernels import optical_attention_cuda as kernels
from backends.kernels.optical_product import Converters

KNOWN = (-2.5, 2.7, -2.3, 2.4, -2.6, 2.9, -9.0, 11.0, -1.5, 1.4)  # q, k, v, scores, out
UNKNOWN = (math.inf, -math.inf) * 5
ARTICLES = torch.tensor([[0] * 10 + [1] * 15 + [2] * 12, [0] * 37])
ARTICLE_MASK = (ARTICLES[:, None, :, None] == ARTICLES[:, None, None, :]) & torch.ones(37, 37).tril().bool()
LONELY_MASK = ARTICLE_MASK.clone()
LONELY_MASK[0, :, 12] = False  # a query that may attend nothing

CASES = {
    # batch, heads, key heads, queries, keys, mask, causal, ranges
    "whole tiles": (2, 4, 2, 32, 32, None, True, KNOWN),
    "odd length": (1, 4, 1, 37, 37, None, True, KNOWN),
    "one query": (1, 2, 2, 1, 37, None, True, KNOWN),
    "longer keys": (1, 2, 1, 20, 37, None, True, KNOWN),
    "not causal": (1, 2, 2, 20, 37, None, False, KNOWN),
    "articles": (2, 2, 1, 37, 37, ARTICLE_MASK, True, KNOWN),
    "one mask for all": (2, 2, 2, 37, 37, ARTICLE_MASK[:1], True, KNOWN),
    "nothing to attend": (2, 2, 1, 37, 37, LONELY_MASK, True, KNOWN),
    "ranges unknown": (1, 2, 1, 37, 37, None, True, UNKNOWN),
}


def attend(case: str, levels: int) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """out, ranges seen, gradients for q, k and v."""
    batch, heads, groups, queries, keys, mask, causal, ranges = CASES[case]
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, number, length, 16).requires_grad_()
        for number, length in ((heads, queries), (groups, keys), (groups, keys))
    )
    step, first_row = torch.tensor(5), torch.tensor(3)
    known = tuple(torch.tensor(end) for end in ranges)
    converters = Converters(levels, levels, 0.02, None, None, 7)
    out, seen = twin.optical_attention(q, k, v, mask, 0.25, causal, known, step, first_row, converters, observe=True)
    return out.detach(), seen, torch.autograd.grad(out, (q, k, v), torch.randn(out.shape))


def errors(case: str, levels: int) -> dict[str, float]:
    out, seen, gradients = attend(case, levels)
    twin._has_kernels = lambda *_: False  # type: ignore[assignment]
    expected, expected_seen, expected_gradients = attend(case, levels)
    twin._has_kernels = lambda *_: True  # type: ignore[assignment]
    level = 2.9 / (levels - 1) if CASES[case][-1] is KNOWN else 1.0
    steps = (out - expected).abs() / level
    return {
        "largest error in levels": steps.max().item(),
        "share of errors above 0.01 levels": (steps > 0.01).double().mean().item(),
        "ranges": max((a - b).abs().item() for a, b in zip(seen, expected_seen, strict=True)),
        "gradients": max(
            ((a - b).norm() / b.norm()).item() for a, b in zip(gradients, expected_gradients, strict=True)
        ),
    }


def main() -> None:
    twin._has_kernels = lambda *_: True  # type: ignore[assignment]
    # tiles so small that a sequence has several of each kind: whole, cut by the causal mask, cut by the end
    kernels.forward_tiles = kernels.grad_query_tiles = lambda head_dim: (16, 16, 4, 1)  # type: ignore[assignment]
    kernels.grad_key_tiles = lambda head_dim: (16, 32, 4, 1)  # type: ignore[assignment]
    for case in CASES:
        print(json.dumps([case, 256, errors(case, 256)]), flush=True)
    for levels in (16, 4096):
        print(json.dumps(["odd length", levels, errors("odd length", levels)]), flush=True)


if __name__ == "__main__":
    main()
