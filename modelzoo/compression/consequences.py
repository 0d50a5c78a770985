"""What a layer's error costs the model: how far it moves the residual stream behind the layer's block.

Errors of two layers can be weighed against each other only where they meet. Relative to its own outputs, a layer that
adds little to the stream is as dear as one that adds much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from modelzoo.compression.methods import principal_outputs
from modelzoo.compression.moments import Moments
from modelzoo.compression.streaming import BlockInputs

Sum = Callable[[Tensor], Tensor]


def spectra_and_costs(
    stream: BlockInputs,
    path: str,
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    moments: Mapping[str, Moments],
    ranks: Mapping[str, int | None],
    sum_: Sum,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Each layer's eigenvalues λ [features], falling, and what one unit of its error E|y − ŷ|² costs.

    The cost is E_t[|Δh_t|² / |h_t|²] / E|y − ŷ|²: h_t is what the block gives for token t, and Δh_t its change where
    this layer alone keeps the first `ranks` directions in which its outputs vary. Whatever reads the stream normalises
    it token by token, so that only Δh's share of h counts. The block is computed once more for each of `layers`.
    """
    spectra: dict[str, Tensor] = {}
    losses: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, layer in layers.items():
        weight, own, rank = layer.weight.to(torch.float64), moments[name], ranks[name] or 0
        directions, spectra[name] = principal_outputs(weight, own.covariance, rank, own.principal)
        if not float(spectra[name][rank:].sum()) > 1e-6 * float(spectra[name].sum()):
            directions = directions[:, :0]  # nothing is lost at this rank: what a unit costs, all that varies tells
        mean = weight @ own.mean + (0 if layer.bias is None else layer.bias.to(torch.float64))
        losses[name] = _what_is_lost(directions, mean)
    found = {name: torch.zeros(2, dtype=torch.float64, device=layer.weight.device) for name, layer in layers.items()}
    changed = [_outputs_without(stream, path, block, layers[name], lost, found[name]) for name, lost in losses.items()]
    for usual, *others in zip(stream.outputs(path, block), *changed, strict=True):
        size = usual.double().square().sum(-1)
        for name, other in zip(losses, others, strict=True):
            change = (other.double() - usual.double()).square().sum(-1)
            found[name][1] += torch.where(size > 0, change / size.where(size > 0, 1.0), 0.0).sum()
    sums = {name: sum_(pair).tolist() for name, pair in found.items()}
    return spectra, {name: change / error if error > 0 else 0.0 for name, (error, change) in sums.items()}


def _what_is_lost(directions: Tensor, mean: Tensor) -> Callable[[Tensor], Tensor]:
    """y → (I − U Uᵀ)(y − E[y]), in float32 on a GPU where y is no wider."""

    def lost(y: Tensor) -> Tensor:
        wide = torch.promote_types(y.dtype, torch.float32) if y.is_cuda else torch.float64
        varied, kept = y.to(wide) - mean.to(wide), directions.to(wide)
        return varied - varied @ kept @ kept.t()

    return lost


def _outputs_without(
    stream: BlockInputs,
    path: str,
    block: nn.Module,
    layer: nn.Linear,
    lost: Callable[[Tensor], Tensor],
    found: Tensor,
) -> Iterator[Tensor]:
    """The block's outputs where the layer gives y − lost(y); |lost(y)|² is added to `found[0]`.

    The layer is changed only while a batch is computed: others read the same block between two of them.
    """

    def change(part: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        error = lost(y)
        found[0] += error.double().square().sum()
        return (y.to(error.dtype) - error).to(y.dtype)

    outputs = stream.outputs(path, block)
    while True:
        handle = layer.register_forward_hook(change)
        try:
            output = next(outputs, None)
        finally:
            handle.remove()
        if output is None:
            return
        yield output
