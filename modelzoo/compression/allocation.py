"""How many ranks each layer gets of one budget of numbers."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from backends.errors import UserError
from backends.ranks import break_even, rank_after, rank_for


@dataclass(frozen=True)
class LayerShape:
    """A linear layer as ranks see it."""

    in_features: int
    out_features: int

    @property
    def dense(self) -> int:
        """Numbers of the matrix itself."""
        return self.in_features * self.out_features

    @property
    def per_rank(self) -> int:
        """Numbers that one rank takes."""
        return self.in_features + self.out_features

    @property
    def most(self) -> int:
        """The highest rank that is worth having: two factors of the next one are no smaller than the matrix."""
        return break_even(self.in_features, self.out_features) - 1


Ranks = dict[str, int | None]  # None: the layer stays dense


def require_keep(keep: float) -> None:
    """UserError unless `keep` is a share."""
    if not 0 < keep <= 1:
        raise UserError(
            f"compress.keep={keep:g}. Expected the share of the layers' numbers to keep: above 0, at most 1."
        )


def given_ranks(shapes: Mapping[str, LayerShape], ranks: Mapping[str, int]) -> Ranks:
    """The ranks asked for, by full layer name; from the break-even on a layer stays dense."""
    return {name: rank if rank <= shapes[name].most else None for name, rank in ranks.items()}


def uniform_ranks(shapes: Mapping[str, LayerShape], keep: float) -> Ranks:
    """The share `keep` of every layer's numbers; a layer with no rank worth having (of 1 output) stays dense."""
    require_keep(keep)
    if keep == 1:
        return dict.fromkeys(shapes)
    return given_ranks(
        shapes, {name: rank_for(keep, shape.in_features, shape.out_features) for name, shape in shapes.items()}
    )


def spectrum_ranks(
    shapes: Mapping[str, LayerShape], spectra: Mapping[str, Tensor], costs: Mapping[str, float], keep: float
) -> Ranks:
    """Ranks that together hold the share `keep` of all layers' numbers, each where it removes most error per number.

    They are ranks that `rank_after` knows. A layer's error Σ_{i>k} λ_i counts as often as `costs` says. Eigenvalues
    fall, so taking the best next rank again and again gives the least sum for the budget. A layer whose next rank would
    be as dear as the matrix becomes dense, if the rest of the budget pays for that, and stops otherwise. What removes
    no error is not bought.
    """
    require_keep(keep)
    if keep == 1:
        return dict.fromkeys(shapes)
    budget = int(keep * sum(shape.dense for shape in shapes.values()))
    ranks = given_ranks(shapes, dict.fromkeys(shapes, 1))
    budget -= sum(shape.dense if ranks[name] is None else shape.per_rank for name, shape in shapes.items())

    def gain(name: str, rank: int) -> float:
        """Of going on from `rank`, per number."""
        step = rank_after(rank) - rank
        return costs[name] * float(spectra[name][rank : rank + step].sum()) / shapes[name].per_rank / step

    queue = [(-gain(name, 1), name) for name, rank in ranks.items() if rank is not None]
    heapq.heapify(queue)
    while queue:
        negative, name = heapq.heappop(queue)
        if negative == 0:
            break
        rank, shape = ranks[name], shapes[name]
        assert rank is not None
        following = rank_after(rank)
        if following > shape.most:
            price = shape.dense - rank * shape.per_rank
            if price <= budget:
                ranks[name], budget = None, budget - price
            continue
        price = (following - rank) * shape.per_rank
        if price > budget:
            continue
        ranks[name], budget = following, budget - price
        heapq.heappush(queue, (-gain(name, following), name))
    return ranks
