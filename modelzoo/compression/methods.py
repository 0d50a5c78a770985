"""Four ways to make two thin matrices of one, from the layer's weights and the moments of its inputs.

svd       nearest to W itself
asvd      nearest to W diag(s), s = E|x|^½ (Yuan et al., arXiv 2312.05821)
svd_llm   least E|Wx − Ŵx|²: what whitening with a Cholesky factor of E[xxᵀ] gives (Wang et al., arXiv 2403.07378)
mimic     least E|y − ŷ|² over all affine maps of the rank, y = Wx + b: the centred closed form (Yu & Wu, AAAI 2023)

The last two project the outputs y onto the directions in which they vary most: with C = E[yyᵀ] (mimic: without the
means) = QΛQᵀ and U the first k columns of Q, ŷ = U Uᵀ y. The error Σ_{i>k} λ_i is known before anything is replaced,
nothing is inverted, and no rank of the inputs is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modelzoo.compression.moments import Moments, eigh


@dataclass(frozen=True)
class Factors:
    """y ≈ weight_out (weight_in x) + bias; float64. `spectrum`: errors that each further rank takes away, falling.

    `floor`: an error that no rank takes away. `error`: E|y − ŷ|² where the spectrum is of another kind of error.
    """

    weight_in: Tensor  # [rank, in]
    weight_out: Tensor  # [out, rank]
    bias: Tensor | None
    spectrum: Tensor
    floor: float = 0.0
    error: float | None = None

    @property
    def rank(self) -> int:
        return len(self.weight_in)

    @property
    def predicted(self) -> float:
        """The error E|y − ŷ|² that the method promises: what the ranks not taken would have removed."""
        return self.floor + float(self.spectrum[self.rank :].sum()) if self.error is None else self.error


Method = Callable[[Tensor, "Tensor | None", Moments, int], Factors]


def compress(method: str, weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    """Factors of rank `rank` for weight [out, in] and bias [out]; arithmetic in float64 on the weight's device."""
    bias = None if bias is None else bias.detach().to(torch.float64)
    return METHODS[method](weight.detach().to(torch.float64), bias, moments, rank)


def measured_error(weight: Tensor, bias: Tensor | None, factors: Factors, moments: Moments) -> float:
    """E|y − ŷ|² over the tokens of `moments`: with D = W − Ŵ and d = b − b̂, tr(D E[xxᵀ] Dᵀ) + 2 dᵀD E[x] + dᵀd."""
    difference = weight.to(torch.float64) - factors.weight_out @ factors.weight_in
    zero = difference.new_zeros(len(difference))
    offset = (zero if bias is None else bias.to(torch.float64)) - (zero if factors.bias is None else factors.bias)
    quadratic = ((difference @ moments.uncentred) * difference).sum()
    return float(quadratic + 2 * offset @ difference @ moments.mean + offset @ offset)


def _svd(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return balanced(right[:rank], left[:, :rank] * values[:rank], bias, values.square())


def start_of_learning(weight: Tensor, bias: Tensor | None, rank: int) -> Factors:
    """The truncated SVD, which knows nothing of the inputs: what gradient descent begins with."""
    return compress("svd", weight, bias, Moments.empty(0), rank)


def _asvd(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    scale = moments.mean_magnitude.sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # an input that is always zero may have any
    left, values, right = torch.linalg.svd(weight * scale, full_matrices=False)
    return balanced(right[:rank] / scale, left[:, :rank] * values[:rank], bias, values.square())


def _svd_llm(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    directions, spectrum = principal_outputs(weight, moments.uncentred, rank)
    return balanced(directions.t() @ weight, directions, bias, spectrum)


def _mimic(weight: Tensor, bias: Tensor | None, moments: Moments, rank: int) -> Factors:
    directions, spectrum = principal_outputs(weight, moments.covariance, rank, moments.principal)
    mean = weight @ moments.mean  # what the projection takes of it, a bias gives back; b itself needs no projection
    offset = mean - directions @ (directions.t() @ mean)
    return balanced(directions.t() @ weight, directions, offset if bias is None else bias + offset, spectrum)


METHODS: dict[str, Method] = {"svd": _svd, "asvd": _asvd, "svd_llm": _svd_llm, "mimic": _mimic}


def principal_outputs(
    weight: Tensor, moment: Tensor, rank: int, principal: Callable[[], tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """U [out, rank], orthonormal, and all eigenvalues of C = W M Wᵀ, falling; M [in, in] symmetric, not negative.

    `principal`: gives `eigh(M)`, where it is known or is asked for again.

    From whichever of C [out, out] and Mᐟ² WᵀW Mᐟ² [in, in] is smaller: they share their eigenvalues but zeros. Columns
    of U beyond the rank of C are zero: nothing varies there.
    """
    out_features, in_features = weight.shape
    if out_features <= in_features:
        values, vectors = eigh(weight @ moment @ weight.t())
        return vectors[:, :rank], values
    inner, basis = eigh(moment) if principal is None else principal()
    root = weight @ (basis * inner.sqrt())  # C = root rootᵀ
    values, vectors = eigh(root.t() @ root)
    seen = values[:rank].sqrt()
    is_seen = seen > seen[:1] * 1e-7  # the eigenvalues are exact to 1e-15 of the largest, these to its root
    directions = root @ vectors[:, :rank] * torch.where(is_seen, 1 / seen.where(is_seen, 1.0), 0.0)
    return directions, values


def balanced(
    weight_in: Tensor, weight_out: Tensor, bias: Tensor | None, spectrum: Tensor, floor: float = 0.0
) -> Factors:
    """Each component as long in one factor as in the other: what trains best, and rounds least in 16 bits."""
    lengths = [weight_in.norm(dim=1), weight_out.norm(dim=0)]
    used = (lengths[0] > 0) & (lengths[1] > 0)
    ratio = torch.where(used, lengths[1] / lengths[0].where(used, 1.0), 1.0).sqrt()
    ratio = torch.where(used, ratio, 1.0)
    return Factors(weight_in * ratio[:, None], weight_out / ratio, bias, spectrum, floor)
