"""Replace a model's linear layers by low-rank ones, block after block, each seeing its compressed predecessors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from backends import load
from backends.errors import UserError, unknown
from backends.layers import BackendLinear, unfuse
from modelzoo.compression.allocation import (
    LayerShape,
    Ranks,
)
from modelzoo.compression.block_calls import Batch
from modelzoo.compression.budget import ranks_by_spectra, stated_ranks
from modelzoo.compression.choosing import chosen_layers
from modelzoo.compression.methods import METHODS, Factors, compress, measured_error
from modelzoo.compression.moments import Moments, TargetMoments
from modelzoo.compression.passes import OnPass
from modelzoo.compression.regression import error_towards_targets, regress, variance_of_targets
from modelzoo.compression.sensitivity import Sensitivity, sensitivities
from modelzoo.compression.staged import DenseBeside, Sum, add_up
from modelzoo.compression.streaming import BlockInputs, linears_of, moments_of

ALLOCATIONS, INPUTS, TARGETS = ("uniform", "spectrum"), ("compressed", "dense"), ("own", "dense")
WEIGHTINGS = ("equal", "gradient")
# layers and their ranks, by name → factors of each
Learned = Callable[[Mapping[str, nn.Linear], Mapping[str, int]], dict[str, Factors]]


@dataclass(frozen=True)
class LayerReport:
    """One layer: its rank (None: dense), E|y − ŷ|² as promised and as measured, and E|y − E[y]|², what y varies.

    y is what the layer is to give: with `targets="own"` what its dense weights give of the inputs it has. ŷ is that of
    the factors in float64, before they are rounded to the weight's dtype.
    """

    name: str
    shape: LayerShape
    rank: int | None
    predicted: float
    measured: float
    variance: float
    spectrum: Tensor

    @property
    def numbers(self) -> int:
        """Numbers of the layer's matrices now."""
        return self.shape.dense if self.rank is None else self.rank * self.shape.per_rank


@torch.no_grad()
def compress_model(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    method: str = "mimic",
    keep: float | None = None,
    ranks: Mapping[str, int] | None = None,
    allocation: Literal["uniform", "spectrum"] = "uniform",
    match: str | Sequence[str] | None = None,
    inputs: Literal["compressed", "dense"] = "compressed",
    targets: Literal["own", "dense"] = "own",
    weighting: Literal["equal", "gradient"] = "equal",
    learned: Learned | None = None,
    sum_: Sum = lambda tensor: tensor,
    on_layer: Callable[[LayerReport], None] = lambda report: None,
    on_pass: OnPass = lambda what, of, done, total: None,
) -> list[LayerReport]:
    """Compress the linear layers of the model's blocks in place; a report of each, in the model's order.

    `batches`: what the model is called with, at least one; read once, once more for `allocation="spectrum"`, and once
    more for `weighting="gradient"`. `ranks` gives ranks by layer name, its end (`q_proj`) or a glob; else `keep` is the
    share of the numbers to stay. `match`: which layers, None: all of the blocks. One row of blocks is compressed, the
    longest with layers that are named. `inputs`: whether a block's moments are those behind its compressed predecessors
    or behind the dense ones. `weighting`: of mimic, whether errors of all outputs count alike or by the loss's
    gradients there; the batches then need a loss (`sensitivity.summed_loss`). `learned` makes all factors beforehand,
    in place of `method`. `sum_` adds up a tensor over the workers of a job, each with batches of its own.
    `on_pass` hears how far it is: of the passes for gradients and spectra, and of the layers themselves. Plain
    nn.Linear layers become `BackendLinear` with the backend lowrank. A UserError before the first block is replaced
    leaves the model as it was.
    """
    if method not in METHODS:
        raise unknown("method", method, tuple(METHODS))
    _require_choices(allocation, inputs, ranks, match)
    _require_targets(targets, method if learned is None else "learned", inputs)
    _require_weighting(weighting, method if learned is None else "learned")
    blocks, layers = chosen_layers(model, tuple(ranks) if ranks is not None else match)
    shapes = {name: LayerShape(layer.in_features, layer.out_features) for name, layer in layers.items()}
    unfuse(model)
    was_training = model.training
    model.eval()
    try:
        chosen = stated_ranks(shapes, keep, ranks, allocation)  # a mistake in them is told before any long work
        replaced = layers if chosen is None else {name: each for name, each in layers.items() if chosen[name]}
        minded: dict[str, Sensitivity] = {}
        if weighting == "gradient" and replaced:
            tell = partial(on_pass, "taking gradients", "batches")
            minded = sensitivities(model, blocks, replaced, batches, sum_, tell)
        if chosen is None:
            assert keep is not None
            tell = partial(on_pass, "taking spectra", "blocks")
            chosen = ranks_by_spectra(model, blocks, shapes, batches, keep, minded, sum_, tell)
        wanted = {name: rank for name, rank in chosen.items() if rank is not None}
        ready = learned(layers, wanted) if learned is not None and wanted else {}
        stream = BlockInputs(model, blocks, batches)
        reports: list[LayerReport] = []
        on_pass("compressing", "layers", 0, len(shapes))
        widths = {name: shape.in_features for name, shape in shapes.items()}
        beside = DenseBeside(stream, widths, sum_) if targets == "dense" else None
        for path, block in blocks.items():
            mine = linears_of(block, path, tuple(shapes))
            if beside is not None:
                block_reports = _towards_dense(path, block, mine, chosen, beside, minded, sum_)
            else:
                block_reports = _towards_own(path, block, mine, chosen, stream, method, inputs, ready, minded, sum_)
            for report in block_reports:
                reports.append(report)
                on_layer(report)
                on_pass("compressing", "layers", len(reports), len(shapes))
    finally:
        model.train(was_training)
    order = {name: number for number, name in enumerate(shapes)}
    return sorted(reports, key=lambda report: order[report.name])


def _require_choices(
    allocation: str, inputs: str, ranks: Mapping[str, int] | None, match: str | Sequence[str] | None
) -> None:
    if allocation not in ALLOCATIONS:
        raise unknown("allocation", allocation, ALLOCATIONS)
    if inputs not in INPUTS:
        raise unknown("inputs", inputs, INPUTS)
    if ranks is not None and (match is not None or allocation != "uniform"):
        what = f"allocation='{allocation}'" if match is None else f"match={match}"
        raise UserError(f"ranks names the layers and says their ranks, got {what} too. Leave one of them out.")


def _require_targets(targets: str, method: str, inputs: str) -> None:
    if targets not in TARGETS:
        raise unknown("targets", targets, TARGETS)
    if targets == "dense" and (method, inputs) != ("mimic", "compressed"):
        raise UserError(
            f"targets='dense' got method='{method}' and inputs='{inputs}'. Expected method='mimic' and "
            "inputs='compressed': that is what can aim at what the dense model gives."
        )


def _require_weighting(weighting: str, method: str) -> None:
    if weighting not in WEIGHTINGS:
        raise unknown("weighting", weighting, WEIGHTINGS)
    if weighting == "gradient" and method != "mimic":
        raise UserError(
            f"weighting='gradient' got method='{method}'. Expected method='mimic': the others have errors of their own."
        )


def _towards_own(
    path: str,
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    ranks: Ranks,
    stream: BlockInputs,
    method: str,
    inputs: str,
    ready: Mapping[str, Factors],
    minded: Mapping[str, Sensitivity],
    sum_: Sum,
) -> Iterator[LayerReport]:
    """Compress a block's layers, each to what its own weights give of its inputs, and put the data behind the block."""
    with moments_of(layers) as moments:
        if inputs == "dense":
            stream.advance(path, block)
        else:
            for _ in stream.outputs(path, block):
                pass
    add_up(moments, sum_)
    for name, layer in layers.items():
        rank = ranks[name]
        if rank is None:
            factors = None
        elif name in ready:
            factors = ready[name]
        elif name in minded:
            nothing_more = TargetMoments.empty(moments[name], layer.out_features)
            factors = regress(layer.weight, layer.bias, nothing_more, rank, sensitivity=minded[name])
        else:
            factors = compress(method, layer.weight, layer.bias, moments[name], rank)
        yield _replace(name, layer, moments[name], factors)
    if inputs == "compressed":
        stream.advance(path, block)


def _towards_dense(
    path: str,
    block: nn.Module,
    layers: Mapping[str, nn.Linear],
    ranks: Ranks,
    beside: DenseBeside,
    minded: Mapping[str, Sensitivity],
    sum_: Sum,
) -> Iterator[LayerReport]:
    """The same towards what the layers give in the dense model, a stage after another."""
    for name, targets in beside.targets(path, block, layers, sum_):
        layer, rank = layers[name], ranks[name]
        shape, weight = LayerShape(layer.in_features, layer.out_features), layer.weight.detach()
        factors = None if rank is None else regress(weight, layer.bias, targets, rank, sensitivity=minded.get(name))
        measured = error_towards_targets(weight, layer.bias, factors, targets)
        variance = variance_of_targets(weight, targets)
        if factors is None:
            yield LayerReport(name, shape, None, measured, measured, variance, weight.new_empty(0, dtype=torch.float64))
        else:
            _store(layer, factors)
            yield LayerReport(name, shape, rank, factors.predicted, measured, variance, factors.spectrum)


def _replace(name: str, layer: nn.Linear, moments: Moments, factors: Factors | None) -> LayerReport:
    """Let the layer hold the factors (None: it stays dense), and say what that does to its outputs."""
    shape = LayerShape(layer.in_features, layer.out_features)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    wide = weight.to(torch.float64)
    variance = float(((wide @ moments.covariance) * wide).sum())
    if factors is None:
        return LayerReport(name, shape, None, 0.0, 0.0, variance, wide.new_empty(0))
    measured = measured_error(weight, bias, factors, moments)
    _store(layer, factors)
    return LayerReport(name, shape, factors.rank, factors.predicted, measured, variance, factors.spectrum)


def _store(layer: nn.Linear, factors: Factors) -> None:
    """Let the layer hold the factors, in its weight's dtype."""
    dtype = layer.weight.dtype
    ours = layer if isinstance(layer, BackendLinear) else BackendLinear.adopt(layer)
    tensors = {"weight_in": factors.weight_in, "weight_out": factors.weight_out}
    if factors.bias is not None:
        tensors["bias"] = factors.bias
    backend = load("lowrank", rank=factors.rank, bias=factors.bias is not None)
    ours.set_backend(backend, {name: tensor.to(dtype) for name, tensor in tensors.items()})
