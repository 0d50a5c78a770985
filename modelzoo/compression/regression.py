"""mimic towards what the dense model gives: y = W x′ + b + t, t being what W misses behind compressed layers.

Least E|y − ŷ|² over all affine maps of x′ of the rank is reduced-rank regression (Izenman, *Reduced-rank regression for
the multivariate linear model*, 1975). Without a limit of rank the best map is C = Cov(y, x′) Cov(x′)⁺; of rank k it is
U Uᵀ C, with U the first k eigenvectors of C Cov(x′) Cᵀ = QΛQᵀ, and the error is tr Cov(y) − Σ_{i≤k} λ_i. Where t = 0,
C is W, and this is mimic.

What is taken is nearer to W than that: C − W is found by ridge regression. A compressed layer in front leaves
directions of x′ in which hardly anything varies any more, and least squares makes large weights of them, which change
nothing as long as the model stays as it is and everything when it is trained on.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from modelzoo.compression.methods import Factors, balanced, principal_outputs
from modelzoo.compression.moments import TargetMoments
from modelzoo.compression.sensitivity import Sensitivity
from modelzoo.compression.weighted import weighted_projection

# of the mean eigenvalue of Cov(x′); docs/lab-notes.md, "Low rank", has what other shares did
RIDGE = 0.003


def regress(
    weight: Tensor,
    bias: Tensor | None,
    targets: TargetMoments,
    rank: int,
    *,
    ridge: float = RIDGE,
    sensitivity: Sensitivity | None = None,
) -> Factors:
    """Factors of rank `rank` for weight [out, in] and bias [out]; float64 on the weight's device.

    C = W + Cov(t, x′) (Cov(x′) + ε I)⁻¹, ε being `ridge` of the mean eigenvalue, and W where x′ does not vary
    (eigenvalues below `targets.resolution` of E|x′|²): nothing was seen there to say otherwise. `Factors.floor` is what
    no rank takes away. With a `sensitivity` the rank goes where the loss minds an error most (`weighted.py`).
    """
    wide, own = weight.detach().to(torch.float64), targets.own.covariance
    values, basis = targets.own.principal()
    is_seen = values > targets.resolution * targets.own.uncentred.trace()
    inverse = torch.where(is_seen, 1 / (values + ridge * values.mean()).where(is_seen, 1.0), 0.0)
    learned = targets.covariance @ basis * inverse @ basis.t()
    best = wide + learned
    if sensitivity is None:
        outer, spectrum = principal_outputs(best, own, rank, targets.own.principal)
        inner = outer.t() @ best
    else:
        inner, outer, spectrum = weighted_projection(wide, best, targets.own, sensitivity, rank)
    offset = wide @ targets.own.mean + targets.mean - outer @ (inner @ targets.own.mean)
    if bias is not None:
        offset = offset + bias.detach().to(torch.float64)
    if sensitivity is None:
        return balanced(inner, outer, offset, spectrum, _floor(best, learned, outer, targets))
    factors = balanced(inner, outer, offset, spectrum)
    return replace(factors, error=error_towards_targets(weight, bias, factors, targets))


def _floor(best: Tensor, learned: Tensor, directions: Tensor, targets: TargetMoments) -> float:
    """E|y − C x′ − E[…]|², and what is met twice of it and of (C − U Uᵀ C) x′ where C is not the least squares."""
    own, missed = targets.own.covariance, targets.covariance
    varied = targets.uncentred_square - targets.mean.square().sum()
    left = varied - 2 * (learned * missed).sum() + ((learned @ own) * learned).sum()
    unfitted = missed - learned @ own  # Cov(y − C x′, x′): 0 for least squares where x′ varies
    rest = best - directions @ (directions.t() @ best)
    return max(float(left), 0.0) + 2 * float((unfitted * rest).sum())


def error_towards_targets(
    weight: Tensor, bias: Tensor | None, factors: Factors | None, targets: TargetMoments
) -> float:
    """E|y − ŷ|² over the tokens of `targets`: E|D x′ + t + d|², D = W − Ŵ and d = b − b̂; without factors Ŵ = W."""
    if factors is None:
        return float(targets.uncentred_square)
    difference = weight.to(torch.float64) - factors.weight_out @ factors.weight_in
    zero = difference.new_zeros(len(difference))
    offset = (zero if bias is None else bias.to(torch.float64)) - (zero if factors.bias is None else factors.bias)
    quadratic = ((difference @ targets.own.uncentred) * difference).sum() + targets.uncentred_square
    crossed = (targets.uncentred * difference).sum()
    mean = difference @ targets.own.mean + targets.mean
    return float(quadratic + 2 * crossed + 2 * offset @ mean + offset @ offset)


def variance_of_targets(weight: Tensor, targets: TargetMoments) -> float:
    """E|y − E[y]|²."""
    wide = weight.to(torch.float64)
    varied = targets.uncentred_square - targets.mean.square().sum()
    return float(((wide @ targets.own.covariance + 2 * targets.covariance) * wide).sum() + varied)
