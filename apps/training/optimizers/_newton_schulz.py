"""Newton–Schulz: the nearest (semi-)orthogonal matrix, from matrix products alone (muon and mango).

X ← a X + (b A + c A²) X with A = X Xᵀ moves each singular value s of X to a s + b s³ + c s⁵ and leaves the singular
vectors. Jordan's coefficients (https://kellerjordan.github.io/posts/muon/) do not converge to 1: they bring all but the
smallest to between about 0.7 and 1.2 in five rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # added to the norm that a matrix is divided by, so that a zero one stays zero


def orthogonalized(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Each matrix [rows, columns] with its singular values near 1, × √max(1, rows/columns); in the inputs' dtype.

    Matrices of one shape, or of its transpose, go through the products together. Pure; `steps` is compiled in.
    """
    batches: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        batches.setdefault((min(rows, columns), max(rows, columns)), []).append(index)
    results: dict[int, Tensor] = {}
    for indices in batches.values():
        batch = newton_schulz([_wide(matrices[index]) for index in indices], steps)
        for index, result in zip(indices, batch.unbind(), strict=True):
            rows, columns = matrices[index].shape
            turned = result.mT if rows > columns else result
            results[index] = turned.to(matrices[index].dtype) * max(1.0, rows / columns) ** 0.5
    return [results[index] for index in range(len(matrices))]


def newton_schulz(matrices: Sequence[Tensor], steps: int) -> Tensor:
    """The matrices, all [m, n] with m ≤ n, after `steps` rounds, as one [batch, m, n] in `product_dtype`.

    Divided by its Frobenius norm at first, which bounds the largest singular value by 1. Of wide matrices two rounds
    are made one product: with F = a + b A + c A², the next A is F A F. In units of 2m³ FLOPs that costs 2n/m + 5 for
    two rounds instead of 4n/m + 2. More rounds at once lose small singular values in bfloat16.
    """
    import torch

    whole = torch.stack(list(matrices))
    norms = torch.linalg.vector_norm(whole, dim=(-2, -1), keepdim=True)
    x = (whole / (norms + EPS)).to(product_dtype(whole))
    rows, columns = x.shape[1:]
    while steps > 0:
        gram = x @ x.mT
        factor = _factor(gram, whole.dtype)
        if steps > 1 and 2 * columns > 3 * rows:
            factor = _factor(factor @ (gram @ factor), whole.dtype) @ factor
            steps -= 1
        x = factor @ x
        steps -= 1
    return x


def _factor(gram: Tensor, wide: torch.dtype) -> Tensor:
    """a + b A + c A² in A's dtype, summed in `wide`.

    a X is got by a on the small factor's diagonal: less to read and write, and closer too (in bfloat16 five rounds are
    off by 1.2 % where a X and B X summed in bfloat16 are off by 2.6 %).
    """
    import torch

    a, b, c = COEFFICIENTS
    identity = a * torch.eye(gram.shape[-1], dtype=wide, device=gram.device)
    return (identity + b * gram.to(wide) + c * (gram @ gram).to(wide)).to(gram.dtype)


def product_dtype(tensor: Tensor) -> torch.dtype:
    """bfloat16 on a GPU, where its products are many times faster and the result need not be exact; else the input's.

    float64 stays what it is everywhere: who asks for it wants to compare.
    """
    import torch

    return torch.bfloat16 if tensor.is_cuda and tensor.dtype != torch.float64 else tensor.dtype


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
