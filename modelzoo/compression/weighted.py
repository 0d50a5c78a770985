"""The best map of a rank where errors count by what the loss minds: least E[eᵀ G e], e = C x − Ŵ x.

With R² = G and FFᵀ = Cov(x) it is the rank's best approximation of R C F (Eckart and Young): Ŵ = R⁻¹ U Uᵀ R C, U being
the first left singular vectors of R C F. The right ones, V, tell the same, Ŵ = C F V S⁻² Vᵀ Fᵀ (CᵀGC), and with
C = W P all that is needed of G there is WᵀGW.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelzoo.compression.methods import principal_outputs
from modelzoo.compression.moments import Moments, eigh
from modelzoo.compression.sensitivity import Sensitivity


def weighted_projection(
    weight: Tensor, best: Tensor, inputs: Moments, sensitivity: Sensitivity, rank: int
) -> tuple[Tensor, Tensor, Tensor]:
    """weight_in [rank, in], weight_out [out, rank] and the weighted errors that each rank takes away, falling.

    `weight` [out, in] is the layer's W, `best` C; float64, as the results.
    """
    damping = sensitivity.damping(len(weight)).to(torch.float64)
    second = sensitivity.second.to(torch.float64)
    if not sensitivity.of_inputs:
        values, basis = eigh(second)
        root = (values + damping).sqrt()
        turned = root[:, None] * (basis.t() @ best)  # R C in the basis of G, where R is diagonal
        directions, spectrum = principal_outputs(turned, inputs.covariance, rank, inputs.principal)
        return directions.t() @ turned, basis @ (directions / root[:, None]), spectrum
    if best is not weight:
        inside = _pseudoinverse(weight.t() @ weight) @ weight.t() @ best  # P
        second = inside.t() @ second @ inside
    minded = second + damping * best.t() @ best  # CᵀGC
    values, basis = inputs.principal()
    half = basis * values.sqrt()
    spectrum, right = eigh(half.t() @ minded @ half)
    sizes = spectrum[:rank].sqrt()
    is_seen = sizes > sizes[:1] * 1e-7
    right = half @ right[:, :rank] * torch.where(is_seen, 1 / sizes.where(is_seen, 1.0), 0.0)
    return right.t() @ minded, best @ right, spectrum


def weighted_spectrum(weight: Tensor, inputs: Moments, sensitivity: Sensitivity) -> Tensor:
    """The weighted errors that each rank takes away, falling, for W itself."""
    wide = weight.detach().to(torch.float64)
    return weighted_projection(wide, wide, inputs, sensitivity, 0)[2]


def _pseudoinverse(matrix: Tensor) -> Tensor:
    """Of a symmetric matrix without negative eigenvalues."""
    values, basis = eigh(matrix)
    is_seen = values > 1e-12 * values[:1]
    return basis * torch.where(is_seen, 1 / values.where(is_seen, 1.0), 0.0) @ basis.t()
