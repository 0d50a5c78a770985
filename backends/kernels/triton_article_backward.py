"""Triton: causal attention inside articles, backward. Tiles and sweeps are those of `triton_article_forward.py`.

Two kernels, so that every gradient is summed in one fixed order: one for dQ, sweeping over keys, one for dK and dV,
sweeping over the queries of every head that shares a key head.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels.triton_functions import compile_in_place

tl: Any = None


def query_sweep(
    acc, q, grad, logsum, delta, k, v, positions, begin, length, first, middle, turn, count,
    SCALE: tl.constexpr, STRIDE_K: tl.constexpr, STRIDE_V: tl.constexpr, D: tl.constexpr, COLS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Σ dS k over tiles of keys as in the forward."""
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
        grad_p = tl.dot(grad, tl.trans(values), input_precision="ieee")
        weights = tl.exp2(scores * SCALE - logsum[:, None])
        if MASKED:
            allowed = (cols[None, :] >= begin[:, None]) & (cols[None, :] <= positions[:, None])
            weights = tl.where(allowed, weights, 0.0)
        grad_scores = weights * (grad_p - delta[:, None])
        acc = tl.dot(grad_scores.to(keys.dtype), keys, acc, input_precision="ieee")
    return acc


def article_grad_query_kernel(
    q, k, v, grad, out, logsums, articles, grad_q, deltas, length,
    STRIDE_QB: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_QM: tl.constexpr,
    STRIDE_KB: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_KN: tl.constexpr,
    STRIDE_VB: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_VN: tl.constexpr,
    STRIDE_GB: tl.constexpr, STRIDE_GH: tl.constexpr, STRIDE_GM: tl.constexpr,
    STRIDE_OB: tl.constexpr, STRIDE_OH: tl.constexpr, STRIDE_OM: tl.constexpr,
    STRIDE_DB: tl.constexpr, STRIDE_DH: tl.constexpr, STRIDE_DM: tl.constexpr,
    PLAIN_SCALE: tl.constexpr, SCALE: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid as the forward's. Writes dQ, and Σ dO ∘ O of each packed row for the other kernel."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
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
    grad += wide_batch * STRIDE_GB
    grad_tile = tl.load(
        grad + heads[:, None] * STRIDE_GH + positions[:, None] * STRIDE_GM + d[None, :], mask=inside[:, None], other=0.0
    )
    out += wide_batch * STRIDE_OB
    out_tile = tl.load(
        out + heads[:, None] * STRIDE_OH + positions[:, None] * STRIDE_OM + d[None, :], mask=inside[:, None], other=0.0
    )
    packed = tl.program_id(1).to(tl.int64) * length * PACK
    logsum = tl.load(logsums + packed + rows, mask=inside, other=0.0)
    delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(deltas + packed + rows, delta, mask=inside)
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
    acc = query_sweep(
        acc, q_tile, grad_tile, logsum, delta, k, v, positions, begin, length, first, diagonal, turn,
        turn + tl.cdiv(latest + 1 - diagonal, COLS), SCALE, STRIDE_KN, STRIDE_VN, D, COLS, True,
    )  # fmt: skip
    if SPLIT:
        acc = query_sweep(
            acc, q_tile, grad_tile, logsum, delta, k, v, positions, begin, length, middle, 0, 0,
            (diagonal - middle) // COLS, SCALE, STRIDE_KN, STRIDE_VN, D, COLS, False,
        )  # fmt: skip
    grad_q += wide_batch * STRIDE_DB
    place = grad_q + heads[:, None] * STRIDE_DH + positions[:, None] * STRIDE_DM + d[None, :]
    tl.store(place, (acc * PLAIN_SCALE).to(grad_q.dtype.element_ty), mask=inside[:, None])


def key_sweep(
    grad_k, grad_v, k, v, q, grad, logsums, deltas, articles, cols, length, first, middle, turn, count,
    SCALE: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_QM: tl.constexpr, STRIDE_GH: tl.constexpr,
    STRIDE_GM: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Σ dSᵀ q and Σ Pᵀ dO over tiles of queries: the first `turn` from position `first` on, then from `middle` on.

    Tiles of scores lie keys × packed rows.
    """
    d, r = tl.arange(0, D), tl.arange(0, ROWS)
    POSITIONS: tl.constexpr = ROWS // PACK
    in_q = (r % PACK * STRIDE_QH + r // PACK * STRIDE_QM)[:, None] + d[None, :]
    in_grad = (r % PACK * STRIDE_GH + r // PACK * STRIDE_GM)[:, None] + d[None, :]
    for index in range(count):
        m = first + index * POSITIONS
        if MASKED:
            m = tl.where(index < turn, m, middle + (index - turn) * POSITIONS)
            positions = m + r // PACK
            inside = positions < length
            q_tile = tl.load(q + m * STRIDE_QM + in_q, mask=inside[:, None], other=0.0)
            logsum = tl.load(logsums + m * PACK + r, mask=inside, other=0.0)
        else:
            q_tile = tl.load(q + m * STRIDE_QM + in_q)
            logsum = tl.load(logsums + m * PACK + r)
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        weights = tl.exp2(scores * SCALE - logsum[None, :])
        if MASKED:
            begin = tl.load(articles + positions, mask=inside, other=length)  # beyond the end: no key is allowed
            allowed = (cols[:, None] >= begin[None, :]) & (cols[:, None] <= positions[None, :])
            weights = tl.where(allowed, weights, 0.0)
            grad_tile = tl.load(grad + m * STRIDE_GM + in_grad, mask=inside[:, None], other=0.0)
            delta = tl.load(deltas + m * PACK + r, mask=inside, other=0.0)
        else:
            grad_tile = tl.load(grad + m * STRIDE_GM + in_grad)
            delta = tl.load(deltas + m * PACK + r)
        grad_v = tl.dot(weights.to(grad_tile.dtype), grad_tile, grad_v, input_precision="ieee")
        grad_p = tl.dot(v, tl.trans(grad_tile), input_precision="ieee")
        grad_scores = weights * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_scores.to(q_tile.dtype), q_tile, grad_k, input_precision="ieee")
    return grad_k, grad_v


def article_grad_key_kernel(
    q, k, v, grad, logsums, deltas, articles, grad_k, grad_v, batch_size, length,
    STRIDE_QB: tl.constexpr, STRIDE_QH: tl.constexpr, STRIDE_QM: tl.constexpr,
    STRIDE_KB: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_KN: tl.constexpr,
    STRIDE_VB: tl.constexpr, STRIDE_VH: tl.constexpr, STRIDE_VN: tl.constexpr,
    STRIDE_GB: tl.constexpr, STRIDE_GH: tl.constexpr, STRIDE_GM: tl.constexpr,
    STRIDE_CB: tl.constexpr, STRIDE_CH: tl.constexpr, STRIDE_CN: tl.constexpr,
    STRIDE_DB: tl.constexpr, STRIDE_DH: tl.constexpr, STRIDE_DN: tl.constexpr,
    PLAIN_SCALE: tl.constexpr, SCALE: tl.constexpr, UNITS: tl.constexpr, GROUPS: tl.constexpr, PACK: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, batch · key heads). Writes dK (strides C) and dV (strides D), summed over query heads."""
    batch, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    wide_batch = batch.to(tl.int64)
    earliest = tl.program_id(0) * COLS
    cols = earliest + tl.arange(0, COLS)
    d = tl.arange(0, D)
    inside = (cols < length)[:, None]
    k += wide_batch * STRIDE_KB + group * STRIDE_KH
    v += wide_batch * STRIDE_VB + group * STRIDE_VH
    k_tile = tl.load(k + cols[:, None] * STRIDE_KN + d[None, :], mask=inside, other=0.0)
    v_tile = tl.load(v + cols[:, None] * STRIDE_VN + d[None, :], mask=inside, other=0.0)
    q += wide_batch * STRIDE_QB
    grad += wide_batch * STRIDE_GB
    articles += batch * length
    ends = articles + batch_size * length
    POSITIONS: tl.constexpr = ROWS // PACK
    latest = tl.minimum(earliest + COLS, length) - 1
    # queries from `diagonal` on, to the end of the first key's article, attend to every key of the tile
    diagonal = tl.cdiv(latest, POSITIONS) * POSITIONS
    begin = earliest // POSITIONS * POSITIONS
    whole = 0
    if SPLIT:
        whole = tl.maximum(tl.load(ends + earliest) - diagonal, 0) // POSITIONS
    turn = (diagonal - begin) // POSITIONS
    rest = diagonal + whole * POSITIONS
    left = tl.cdiv(tl.maximum(tl.load(ends + latest) - rest, 0), POSITIONS)
    grad_k_tile = tl.zeros((COLS, D), tl.float32)
    grad_v_tile = tl.zeros((COLS, D), tl.float32)
    for part in range(UNITS // GROUPS):
        unit = group * (UNITS // GROUPS) + part
        packed = (batch * UNITS + unit).to(tl.int64) * length * PACK
        q_unit, grad_unit = q + unit * PACK * STRIDE_QH, grad + unit * PACK * STRIDE_GH
        grad_k_tile, grad_v_tile = key_sweep(
            grad_k_tile, grad_v_tile, k_tile, v_tile, q_unit, grad_unit, logsums + packed, deltas + packed, articles,
            cols, length, begin, rest, turn, turn + left, SCALE, STRIDE_QH, STRIDE_QM, STRIDE_GH, STRIDE_GM, PACK, D,
            ROWS, True,
        )  # fmt: skip
        if SPLIT:
            grad_k_tile, grad_v_tile = key_sweep(
                grad_k_tile, grad_v_tile, k_tile, v_tile, q_unit, grad_unit, logsums + packed, deltas + packed,
                articles, cols, length, diagonal, 0, 0, whole, SCALE, STRIDE_QH, STRIDE_QM, STRIDE_GH, STRIDE_GM, PACK,
                D, ROWS, False,
            )  # fmt: skip
    grad_k += wide_batch * STRIDE_CB + group * STRIDE_CH
    grad_v += wide_batch * STRIDE_DB + group * STRIDE_DH
    written = (grad_k_tile * PLAIN_SCALE).to(grad_k.dtype.element_ty)
    tl.store(grad_k + cols[:, None] * STRIDE_CN + d[None, :], written, mask=inside)
    tl.store(grad_v + cols[:, None] * STRIDE_DN + d[None, :], grad_v_tile.to(grad_v.dtype.element_ty), mask=inside)


def compile_kernels() -> None:
    """Make this file's functions Triton functions."""
    compile_in_place(globals(), query_sweep, key_sweep, article_grad_query_kernel, article_grad_key_kernel)
