"""How many ranks each layer gets: what the user says, the same share of each, or where they take away most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from backends.errors import UserError
from modelzoo.compression.allocation import (
    LayerShape,
    Ranks,
    given_ranks,
    require_keep,
    spectrum_ranks,
    uniform_ranks,
)
from modelzoo.compression.block_calls import Batch
from modelzoo.compression.choosing import ranks_by_layer
from modelzoo.compression.consequences import spectra_and_costs
from modelzoo.compression.passes import Tell, counted
from modelzoo.compression.sensitivity import Sensitivity
from modelzoo.compression.staged import Sum, add_up
from modelzoo.compression.streaming import BlockInputs, linears_of, moments_of
from modelzoo.compression.weighted import weighted_spectrum


def spectra_of(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    shapes: Mapping[str, LayerShape],
    batches: Iterable[Batch],
    keep: float,
    sum_: Sum,
    tell: Tell = lambda done, total: None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The eigenvalues of each layer's output covariance, falling, and what a unit of its error costs; both of the dense
    model. `keep`: the share at which a layer's error is looked at.
    """
    stream = BlockInputs(model, blocks, batches)
    spectra: dict[str, Tensor] = {}
    costs: dict[str, float] = {}
    ranks = uniform_ranks(shapes, keep)
    for path, block in counted(blocks.items(), tell):
        mine = linears_of(block, path, tuple(shapes))
        with moments_of(mine) as moments:
            for _ in stream.outputs(path, block):
                pass
        add_up(moments, sum_)
        found = spectra_and_costs(stream, path, block, mine, moments, ranks, sum_)
        spectra |= found[0]
        costs |= found[1]
        stream.advance(path, block)
    return spectra, costs


def weighted_spectra_of(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    shapes: Mapping[str, LayerShape],
    batches: Iterable[Batch],
    minded: Mapping[str, Sensitivity],
    sum_: Sum,
    tell: Tell = lambda done, total: None,
) -> dict[str, Tensor]:
    """What each rank of a layer takes away of its weighted errors in the dense model: all in the loss's unit."""
    stream = BlockInputs(model, blocks, batches)
    spectra: dict[str, Tensor] = {}
    for path, block in counted(blocks.items(), tell):
        mine = linears_of(block, path, tuple(shapes))
        with moments_of(mine) as moments:
            stream.advance(path, block)
        add_up(moments, sum_)
        for name, layer in mine.items():
            spectra[name] = weighted_spectrum(layer.weight, moments[name], minded[name])
    return spectra


def stated_ranks(
    shapes: Mapping[str, LayerShape], keep: float | None, ranks: Mapping[str, int] | None, allocation: str
) -> Ranks | None:
    """The rank of each layer, from `keep` or `ranks`; None where `ranks_by_spectra` has to look at spectra."""
    if (keep is None) == (ranks is None):
        raise UserError("Expected one of compress.keep and compress.ranks.")
    if ranks is not None:
        return given_ranks(shapes, ranks_by_layer(shapes, ranks))
    assert keep is not None
    require_keep(keep)
    return uniform_ranks(shapes, keep) if allocation == "uniform" or keep == 1 else None


def ranks_by_spectra(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    shapes: Mapping[str, LayerShape],
    batches: Iterable[Batch],
    keep: float,
    minded: Mapping[str, Sensitivity],
    sum_: Sum,
    tell: Tell = lambda done, total: None,
) -> Ranks:
    """The share `keep` of all layers' numbers, spent where it takes away most; `minded`: of weighted errors.

    `tell` hears of each block whose spectra are taken.
    """
    if minded:
        spectra = weighted_spectra_of(model, blocks, shapes, batches, minded, sum_, tell)
        return spectrum_ranks(shapes, spectra, dict.fromkeys(shapes, 1.0), keep)
    return spectrum_ranks(shapes, *spectra_of(model, blocks, shapes, batches, keep, sum_, tell), keep)
