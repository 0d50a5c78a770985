"""The cross-entropy kernel in Triton's interpreter against float64 and autograd: one JSON line of errors a case.

    TRITON_INTERPRET=1 python -m tests.backends.kernels.interpreted_cross_entropy

A program of its own, because Triton reads that variable once, when a kernel is made.
"""

import json

import torch
from torch import Tensor

from backends.kernels import cross_entropy

TERMS = {"label_smoothing": torch.tensor(0.2), "z_loss": torch.tensor(0.3)}
ALONE = [{name: number} for name, number in TERMS.items()]

CASES = {
    # rows, vocabulary, size of the logits, share of tokens that count, terms; tiles hold 128 logits
    "one token": (1, 300, 3.0, 1.0, {}),
    "a vocabulary of two": (3, 2, 3.0, 1.0, {}),
    "whole tiles": (4, 256, 3.0, 0.7, {}),
    "one more than a tile": (4, 129, 30.0, 0.7, TERMS),
    "odd": (5, 333, 300.0, 0.7, {}),
    "smoothed": (5, 333, 3.0, 0.7, ALONE[0]),
    "large normalisers": (5, 333, 30.0, 0.7, ALONE[1]),
    "both terms": (5, 333, 3.0, 1.0, TERMS),
    "all masked": (4, 300, 1e4, 0.0, TERMS),
}


def reference(logits: Tensor, labels: Tensor, scale: Tensor, terms: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The formulas in float64, row by row where the token counts: CE, objective, gradient."""
    leaf = logits.double().requires_grad_()
    log_p = torch.log_softmax(leaf, -1)
    counted = scale != 0
    entropy = -log_p[torch.arange(len(labels)), labels.clamp(0)] * counted
    eps, z = (terms.get(name, torch.tensor(0.0)).double() for name in TERMS)
    smoothed = (1 - eps) * entropy - eps * log_p.mean(-1)
    objective = (smoothed + z * torch.logsumexp(leaf, -1) ** 2) * counted
    (gradient,) = torch.autograd.grad((objective * scale).sum(), [leaf])
    return entropy.detach(), objective.detach(), gradient


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, vocabulary, size, share, _ = CASES[case]
    generator = torch.Generator().manual_seed(rows + vocabulary)
    logits = size * torch.randn(rows, vocabulary, generator=generator)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    scale = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) < share)
    return logits, torch.where(scale == 0, -100, labels), scale


def errors(case: str, dtype: torch.dtype) -> dict[str, float]:
    logits, labels, scale = inputs(case)
    logits, terms = logits.to(dtype), CASES[case][-1]
    before = logits.clone()
    entropy, objective, gradient = cross_entropy.cross_entropy_and_gradient(logits, labels, scale, **terms)
    expected = reference(logits, labels, scale, terms)
    found = (entropy, objective if terms else entropy, gradient)
    names = ("entropy", "objective", "gradient")
    distances = {
        name: float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-9))
        for name, a, b in zip(names, found, expected, strict=True)
    }
    return distances | {"logits changed": float((logits - before).abs().max())}


def unusual() -> dict[str, float]:
    """Logits of −∞ give no NaN; NaN and +∞ are not hidden, but where a token does not count they are."""
    logits = torch.randn(4, 300)
    logits[0, :128] = -torch.inf
    logits[1, 7] = torch.nan
    logits[2, 290] = torch.inf
    logits[3] = torch.nan
    labels, scale = torch.full((4,), 200), torch.tensor([0.5, 0.5, 0.5, 0.0])
    entropy, _, gradient = cross_entropy.cross_entropy_and_gradient(logits, labels, scale)
    wanted = reference(logits[:1], labels[:1], scale[:1], {})
    return {
        "minus infinity": float((gradient[0] - wanted[2][0]).abs().max() + (entropy[0] - wanted[0][0]).abs()),
        "not finite": float(entropy[1:3].isfinite().sum() + gradient[1:3].isfinite().all(-1).sum()),
        "does not count": float(entropy[3].abs() + gradient[3].abs().max()),
    }


def main() -> None:
    cross_entropy.tiles = lambda _: (128, 4, 1)  # type: ignore[assignment]
    for case in CASES:
        print(json.dumps([case, "float32", errors(case, torch.float32)]), flush=True)
    print(json.dumps(["both terms", "bfloat16", errors("both terms", torch.bfloat16)]), flush=True)
    print(json.dumps(["unusual", "float32", unusual()]), flush=True)


if __name__ == "__main__":
    main()
