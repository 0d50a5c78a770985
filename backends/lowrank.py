"""Low rank: a linear layer stores two thin matrices in place of W, and computes y = W_out (W_in x) + b."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.base import Backend, Cost, State
from backends.errors import UserError
from backends.ranks import break_even, rank_for


class Lowrank(Backend):
    """W ≈ W_out W_in of rank r, from a dense W the nearest one (truncated SVD, √Σ to each factor).

    Stored and trained are `weight_in` [r, in], `weight_out` [out, r] and the bias; W itself is gone. Fewer numbers and
    fewer FLOPs than W while r < in·out / (in + out). Attention's products are not computed here.
    """

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of a rule. `rank`, or without it `keep`, the share of a layer's numbers that the factors hold.

        `bias`: store one even where the dense layer has none, which features whose mean is not zero ask for.
        """

        rank: int | None = None
        keep: float = 0.5
        bias: bool = False

        def __post_init__(self) -> None:
            if self.rank is not None and self.rank < 1:
                raise UserError(f"Backend lowrank has rank={self.rank}. Expected at least 1.")
            if not 0 < self.keep <= 1:
                raise UserError(f"Backend lowrank has keep={self.keep:g}. Expected a share above 0 and at most 1.")

    source_modules: ClassVar[tuple[str, ...]] = ("backends.ranks",)
    input_matrix: ClassVar[str | None] = "weight_in"
    config: Config

    def linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        return self.behind_input_matrix(F.linear(x, weight["weight_in"]), weight), state

    def behind_input_matrix(self, product: Tensor, weight: Any) -> Tensor:
        return F.linear(product, weight["weight_out"], weight.get("bias"))

    def rank(self, in_features: int, out_features: int) -> int:
        """The rank of a layer. UserError when that is more than any matrix of its shape has."""
        if self.config.rank is None:
            return rank_for(self.config.keep, in_features, out_features)
        rank = self.config.rank
        if rank > min(in_features, out_features):
            limit, worth = min(in_features, out_features), break_even(in_features, out_features)
            raise UserError(
                f"Backend lowrank has rank={rank} for a layer of {in_features} to {out_features} features. "
                f"Expected at most {limit}; it saves numbers below {worth}."
            )
        return rank

    def parameter_spec(self, in_features: int, out_features: int, bias: bool) -> dict[str, tuple[int, ...]]:
        rank = self.rank(in_features, out_features)
        spec: dict[str, tuple[int, ...]] = {"weight_in": (rank, in_features), "weight_out": (out_features, rank)}
        return spec | ({"bias": (out_features,)} if bias or self.config.bias else {})

    def initial_parameters(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        weight_in, weight_out = truncated_svd(weight, self.rank(weight.shape[1], weight.shape[0]))
        made = {"weight_in": weight_in.to(weight.dtype), "weight_out": weight_out.to(weight.dtype)}
        if bias is not None:
            made["bias"] = bias.clone()
        elif self.config.bias:
            made["bias"] = weight.new_zeros(len(weight))
        return made

    def cost(self, m: int, k: int, n: int, *, itemsize: int = 4) -> Cost:
        rank = self.rank(k, n)
        parts = [super().cost(m, k, rank, itemsize=itemsize), super().cost(m, rank, n, itemsize=itemsize)]
        return Cost(flops=sum(part.flops for part in parts), bytes=sum(part.bytes for part in parts))


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[rank, in] and [out, rank], whose product is nearest to weight [out, in]; in at least float32."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if wide.is_meta:  # shapes only: nothing is decomposed
        return wide.new_empty(rank, wide.shape[1]), wide.new_empty(wide.shape[0], rank)
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root
