"""What compression has to know of a layer's inputs: their first and second moments, summed as they stream past."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

ROWS = 8192  # tokens multiplied at a time: what they take in float64 stays small


@dataclass
class Moments:
    """Sums over tokens x [in]: their number, Σx, Σ|x| and Σxxᵀ, in float64 where the device has it.

    On a GPU the products are made in float32 over at most `ROWS` tokens and summed in float64, which loses nothing that
    the inputs have.
    """

    count: int
    total: Tensor
    magnitude: Tensor
    second: Tensor
    _principal: tuple[int, Tensor, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> Moments:
        vector = torch.zeros(in_features, dtype=torch.float64, device=device)
        return cls(0, vector, vector.clone(), vector.new_zeros(in_features, in_features))

    def add(self, x: Tensor) -> None:
        """Count the tokens of x [..., in]."""
        for rows in x.detach().reshape(-1, x.shape[-1]).split(ROWS):
            wide = rows.to(torch.float64)
            self.count += len(rows)
            self.total += wide.sum(0)
            self.magnitude += wide.abs().sum(0)
            exact = rows.to(torch.promote_types(rows.dtype, torch.float32)) if rows.is_cuda else wide
            self.second += exact.t() @ exact

    def merge(self, other: Moments) -> None:
        """Count what `other` has seen too."""
        self.count += other.count
        self.total += other.total
        self.magnitude += other.magnitude
        self.second += other.second

    @property
    def mean(self) -> Tensor:
        """E[x]."""
        return self.total / self.count

    @property
    def mean_magnitude(self) -> Tensor:
        """E|x|."""
        return self.magnitude / self.count

    @property
    def uncentred(self) -> Tensor:
        """E[xxᵀ]."""
        return self.second / self.count

    @property
    def covariance(self) -> Tensor:
        """E[xxᵀ] − E[x]E[x]ᵀ."""
        return self.uncentred - torch.outer(self.mean, self.mean)

    def principal(self) -> tuple[Tensor, Tensor]:
        """`eigh` of the covariance. Kept until further tokens are counted: layers of one input have it in common."""
        if self._principal is None or self._principal[0] != self.count:
            self._principal = (self.count, *eigh(self.covariance))
        return self._principal[1:]


@dataclass
class TargetMoments:
    """Sums over tokens of a layer's inputs x′ [in] and of t [out], what is wanted beyond what its own weights give.

    `own`: of x′, which layers with one input share; Σt, Σ|t|² and `product`, Σ t x′ᵀ, in float64 as in `Moments`.
    """

    own: Moments
    total: Tensor
    squared: Tensor
    product: Tensor

    @classmethod
    def empty(cls, own: Moments, out_features: int) -> TargetMoments:
        total = own.total.new_zeros(out_features)
        return cls(own, total, total.new_zeros(()), total.new_zeros(out_features, len(own.total)))

    def add(self, own: Tensor, wanted: Tensor) -> None:
        """Count the tokens of x′ [..., in] and t [..., out]; `self.own` is counted by whoever shares it."""
        pairs = (each.detach().reshape(-1, each.shape[-1]).split(ROWS) for each in (own, wanted))
        for x, t in zip(*pairs, strict=True):
            wide = t.to(torch.float64)
            self.total += wide.sum(0)
            self.squared += wide.square().sum()
            exact = torch.promote_types(x.dtype, torch.float32) if x.is_cuda else torch.float64
            self.product += t.to(exact).t() @ x.to(exact)

    @property
    def resolution(self) -> float:
        """The share of E|x′|² below which what an input varies is taken for rounding of the products."""
        return 1e-6 if self.product.is_cuda else 1e-12

    @property
    def mean(self) -> Tensor:
        """E[t]."""
        return self.total / self.own.count

    @property
    def uncentred_square(self) -> Tensor:
        """E|t|²."""
        return self.squared / self.own.count

    @property
    def uncentred(self) -> Tensor:
        """E[t x′ᵀ]."""
        return self.product / self.own.count

    @property
    def covariance(self) -> Tensor:
        """Cov(t, x′)."""
        return self.uncentred - torch.outer(self.mean, self.own.mean)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling and none below 0, and their eigenvectors as columns."""
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    return values.flip(0).clamp_min(0.0), vectors.flip(1)
