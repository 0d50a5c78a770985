"""What compression has to know of a layer's inputs: their first and second moments, summed as they stream past."""

from __future__ import annotations

from dataclasses import dataclass

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
