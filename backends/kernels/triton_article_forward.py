"""Triton: causal attention inside articles, forward, for packed rows. `article_attention.py` has the math.

Query heads that share a key head lie beside each other in a tile: row r of the packed rows is position r // PACK, head
r % PACK of a unit of PACK heads. A tile then spans few positions, so that little of what it sweeps over is masked, and
the gradients of keys sum over a unit's heads in one loop. A tile of queries sweeps from the first key of its oldest
article to its own last position. Tiles at both ends are masked; those between, where every key is in the article of
every query, need no mask and with SPLIT have a loop of their own.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels.triton_functions import compile_in_place

tl: Any = None


def forward_sweep(
    acc, top, total, q, k, v, positions, begin, length, first, middle, turn, count,
    SCALE: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """`count` tiles of keys: the first `turn` from key `first` on, the others from key `middle` on."""
    d = tl.arange(0, D)
    for index in range(count):
        n = first + index * COLS
        if MASKED:
            n = tl.where(index < turn, n, middle + (index - turn) * COLS)
        cols = n + tl.arange(0, COLS)
        if MASKED:
            inside = (cols < length)[:, None]
            keys = tl.load(k + cols[:, None] * STRIDE_K + d[None, :], mask=inside, other=0.0)
            values = tl.load(v + cols[:, None] * STRIDE_V + d[None, :], mask=inside, other=0.0)
        else:
            keys = tl.load(k + cols[:, None] * STRIDE_K + d[None, :])
            values = tl.load(v + cols[:, None] * STRIDE_V + d[None, :])
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        if MASKED:
            allowed = (cols[None, :] >= begin[:, None]) & (cols[None, :] <= positions[:, None])
            scores = tl.where(allowed, scores, -float("inf"))
        renewed = tl.maximum(top, tl.max(scores, 1) * SCALE)
        weights = tl.exp2(scores * SCALE - renewed[:, None])
        correction = tl.exp2(top - renewed)
        top = renewed
        total = total * correction + tl.sum(weights, 1)
        acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
    return acc, top, total


def article_forward_kernel(
    q, k, v, articles, out, logsums, length,
    STRIDE_QB: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_QM: tl.constexpr,
    STRIDE_KB: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_KN: tl.constexpr,
    STRIDE_VB: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_VN: tl.constexpr,
    STRIDE_OB: tl.constexpr, STRIDE_OH: tl.constexpr, STRIDE_OM: tl.constexpr,
    SCALE: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of packed rows, batch · units). SCALE: of scores, times log₂ e; logsums: log₂ Σ exp2, packed."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # in one long article the last tiles take longest: start them
    batch, unit = tl.program_id(1) // UNITS, tl.program_id(1) % UNITS
    wide_batch, group = batch.to(tl.int64), unit // (UNITS // GROUPS)
    rows = block * ROWS + tl.arange(0, ROWS)
    positions, heads = rows // PACK, unit * PACK + rows % PACK
    inside = positions < length
    d = tl.arange(0, D)
    q += wide_batch * STRIDE_QB
    q_tile = tl.load(
        q + heads[:, None] * STRIDE_QH + positions[:, None] * STRIDE_QM + d[None, :], mask=inside[:, None], other=0.0
    )
    k += wide_batch * STRIDE_KB + group * STRIDE_KH
    v += wide_batch * STRIDE_VB + group * STRIDE_VH
    articles += batch * length
    begin = tl.load(articles + positions, mask=inside, other=0)
    earliest = block * (ROWS // PACK)
    latest = tl.minimum(earliest + ROWS // PACK, length) - 1
    first = tl.load(articles + earliest) // COLS * COLS
    diagonal = earliest // COLS * COLS
    middle = diagonal
    if SPLIT:
        middle = tl.minimum(tl.cdiv(tl.load(articles + latest), COLS) * COLS, diagonal)
    turn = (middle - first) // COLS
    acc = tl.zeros((ROWS, D), tl.float32)
    top = tl.full((ROWS,), -1e30, tl.float32)  # finite: a tile may hold no key of a row
    total = tl.zeros((ROWS,), tl.float32)
    acc, top, total = forward_sweep(
        acc, top, total, q_tile, k, v, positions, begin, length, first, diagonal, turn,
        turn + tl.cdiv(latest + 1 - diagonal, COLS), SCALE, STRIDE_KN, STRIDE_VN, D, COLS, True,
    )  # fmt: skip
    if SPLIT:
        acc, top, total = forward_sweep(
            acc, top, total, q_tile, k, v, positions, begin, length, middle, 0, 0,
            (diagonal - middle) // COLS, SCALE, STRIDE_KN, STRIDE_VN, D, COLS, False,
        )  # fmt: skip
    acc = acc / total[:, None]
    out += wide_batch * STRIDE_OB
    place = out + heads[:, None] * STRIDE_OH + positions[:, None] * STRIDE_OM + d[None, :]
    tl.store(place, acc.to(out.dtype.element_ty), mask=inside[:, None])
    logsums += tl.program_id(1).to(tl.int64) * length * PACK
    tl.store(logsums + rows, top + tl.log2(total), mask=inside)


def compile_kernels() -> None:
    """Make this file's functions Triton functions."""
    compile_in_place(globals(), forward_sweep, article_forward_kernel)
