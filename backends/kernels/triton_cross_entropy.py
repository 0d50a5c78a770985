"""Triton: cross entropy of a row of logits, and the logits turned into their gradient where they lie.

One program takes one row. Its first sweep finds the softmax's denominator, its second writes the gradient, from the end
of the row to its beginning: what was read last is still near.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels.triton_functions import compile_in_place

tl: Any = None


def cross_entropy_kernel(
    logits, labels, grad_scale, label_smoothing, z_loss, entropies, objectives,
    VOCABULARY: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, SMOOTHED: tl.constexpr, PENALISED: tl.constexpr,
):  # fmt: skip
    """Grid (rows). `cross_entropy.py` has the formulas; a row of scale 0 is not read."""
    row, lanes = tl.program_id(0), tl.arange(0, TILE)
    logits += row.to(tl.int64) * VOCABULARY
    scale, label = tl.load(grad_scale + row).to(tl.float32), tl.load(labels + row).to(tl.int32)
    TILES: tl.constexpr = (VOCABULARY + TILE - 1) // TILE
    log2_e = 1.4426950408889634
    entropy, objective = 0.0, 0.0
    if scale == 0.0:
        for index in range(TILES):
            columns = index * TILE + lanes
            nothing = tl.zeros((TILE,), logits.dtype.element_ty)
            tl.store(logits + columns, nothing, mask=columns < VOCABULARY)
    else:
        target = tl.load(logits + label, mask=(label >= 0) & (label < VOCABULARY), other=0.0).to(tl.float32)
        # not −∞, so that a tile of −∞ alone gives no NaN
        top, total, plain_sum = -1e30, 0.0, 0.0
        for index in tl.range(TILES, num_stages=STAGES):
            columns = index * TILE + lanes
            inside = columns < VOCABULARY
            x = tl.load(logits + columns, mask=inside, other=-float("inf")).to(tl.float32)
            renewed = tl.maximum(top, tl.max(x, 0))
            weights = tl.exp2(x * log2_e - renewed * log2_e)
            total = total * tl.exp2((top - renewed) * log2_e) + tl.sum(weights, 0)
            top = renewed
            if SMOOTHED:
                plain_sum += tl.sum(tl.where(inside, x, 0.0), 0)
        log_z = top + tl.log(total)
        entropy = log_z - target
        objective, on_label, everywhere, of_softmax = entropy, scale, 0.0, scale
        if SMOOTHED:
            smoothing = tl.load(label_smoothing).to(tl.float32)
            objective += smoothing * (target - plain_sum / VOCABULARY)
            on_label, everywhere = scale * (1.0 - smoothing), scale * smoothing / VOCABULARY
        if PENALISED:
            penalty = tl.load(z_loss).to(tl.float32)
            objective += penalty * log_z * log_z
            of_softmax = scale * (1.0 + 2.0 * penalty * log_z)
        for index in tl.range(TILES, num_stages=STAGES):
            start = (TILES - 1 - index) * TILE
            columns = start + lanes
            inside = columns < VOCABULARY
            x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp2(x * log2_e - log_z * log2_e) * of_softmax - everywhere
            if (label >= start) & (label < start + TILE):
                gradient = tl.where(columns == label, gradient - on_label, gradient)
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)
    tl.store(entropies + row, entropy)
    if SMOOTHED or PENALISED:
        tl.store(objectives + row, objective)


def compiled_kernel() -> Any:
    """The kernel as a Triton function."""
    compile_in_place(globals(), cross_entropy_kernel)
    return globals()["cross_entropy_kernel"]
