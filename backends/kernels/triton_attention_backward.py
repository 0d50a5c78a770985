"""Triton: optical attention, backward, straight through the converters and without a scores tensor in memory.

The probabilities are those of the quantised scores, computed again with the same random numbers. Two kernels, so that
every gradient is summed in one fixed order: one for dQ, sweeping over keys, one for dK and dV, sweeping over the
queries of every head that shares a key head.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels import triton_attention_forward, triton_quantiser
from backends.kernels.triton_functions import compile_in_place

tl: Any = None
range_size: Any = None
converter: Any = None
random_number: Any = None
converted_level: Any = None
allowed_pairs: Any = None


def query_sweep(
    grad_q, q, grad_out, logsum, delta, k, plain_k, plain_v, stride_kn, stride_ckn, stride_cvn, row_index, rows,
    first, second, slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col,
    num_rows, num_cols, start, stop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Σ dS k over keys start … stop, for one block of queries."""
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        if EDGE:
            inside = cols < num_cols
            k_t = tl.load(k + cols[None, :] * stride_kn + d[:, None], mask=inside[None, :], other=0.0)
            v_t = tl.load(plain_v + cols[None, :] * stride_cvn + dv[:, None], mask=inside[None, :], other=0.0)
            keys = tl.load(plain_k + cols[:, None] * stride_ckn + d[None, :], mask=inside[:, None], other=0.0)
        else:
            k_t = tl.load(k + cols[None, :] * stride_kn + d[:, None])
            v_t = tl.load(plain_v + cols[None, :] * stride_cvn + dv[:, None])
            keys = tl.load(plain_k + cols[:, None] * stride_ckn + d[None, :])
        raw = tl.dot(q, k_t, input_precision="ieee")
        grad_p = tl.dot(grad_out, v_t, input_precision="ieee")
        random = random_number(row_index[:, None] + cols[None, :].to(tl.uint32), first, second)
        level = converted_level(raw, random, slope, shift, gain, low, high, rounder)
        probability = tl.exp2(alpha * level - logsum[:, None])
        if EDGE:
            allowed = allowed_pairs(
                rows[:, None], cols[None, :], mask, stride_mask_row, stride_mask_col, num_rows, num_cols, CAUSAL, MASKED
            )
            probability = tl.where(allowed, probability, 0.0)
        grad_score = probability * (grad_p - delta[:, None])
        grad_q = tl.dot(grad_score.to(keys.dtype), keys, grad_q, input_precision="ieee")
    return grad_q


def attention_grad_query_kernel(
    q, k, plain_k, plain_v, grad_out, plain_out, logsums, ranges, keys, first_row, mask, spans, grad_q, deltas,
    stride_qb, stride_qh, stride_qm: tl.constexpr, stride_kb, stride_kh, stride_kn: tl.constexpr,
    stride_ckb, stride_ckh, stride_ckn: tl.constexpr, stride_cvb, stride_cvh, stride_cvn: tl.constexpr,
    stride_gb, stride_gh, stride_gm: tl.constexpr, stride_ob, stride_oh, stride_om,
    stride_dqb, stride_dqh, stride_dqm, stride_mask_batch, stride_mask_row, stride_mask_col,
    stride_spans, num_rows, num_cols, SCALE: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, OUTPUT_LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, batch · heads). Writes dQ, and Σ P ∘ dP of each row for the other kernel.

    Strides between rows are constants, as they are for a model: registers for them cost occupancy.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the last blocks are the longest: start them
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    inside = rows[:, None] < num_rows
    wide_batch = batch.to(tl.int64)
    q += wide_batch * stride_qb + head * stride_qh
    q_tile = tl.load(q + rows[:, None] * stride_qm + d[None, :], mask=inside, other=0.0)
    grad_out += wide_batch * stride_gb + head * stride_gh
    grad_tile = tl.load(grad_out + rows[:, None] * stride_gm + dv[None, :], mask=inside, other=0.0)
    plain_out += wide_batch * stride_ob + head * stride_oh
    out_tile = tl.load(plain_out + rows[:, None] * stride_om + dv[None, :], mask=inside, other=0.0)
    k += wide_batch * stride_kb + group * stride_kh
    plain_k += wide_batch * stride_ckb + group * stride_ckh
    plain_v += wide_batch * stride_cvb + group * stride_cvh
    mask += wide_batch * stride_mask_batch
    unit = range_size(ranges) * range_size(ranges + 2)
    slope, shift, gain, low, high, rounder, step, _ = converter(ranges + 6, unit, OUTPUT_LEVELS)
    alpha = step * SCALE * 1.4426950408889634  # exponents of 2
    entry = (tl.load(first_row).to(tl.uint32) + batch.to(tl.uint32)) * HEADS + head.to(tl.uint32)
    row_index = (entry * num_rows + rows.to(tl.uint32)) * num_cols
    first, second = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)
    place = tl.program_id(1).to(tl.int64) * num_rows + rows
    logsum = tl.load(logsums + place, mask=rows < num_rows, other=float("inf"))
    delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(deltas + place, delta, mask=rows < num_rows)

    start, stop = 0, num_cols
    if CAUSAL:
        stop = tl.minimum(num_cols, (block + 1) * BLOCK_M)
        middle = tl.minimum(num_cols, block * BLOCK_M) // BLOCK_N * BLOCK_N
    else:
        middle = num_cols // BLOCK_N * BLOCK_N
    if MASKED:
        spans += batch * stride_spans + block * 2
        start, stop = tl.load(spans) // BLOCK_N * BLOCK_N, tl.load(spans + 1)
        middle = start
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    if not MASKED:
        acc = query_sweep(
            acc, q_tile, grad_tile, logsum, delta, k, plain_k, plain_v, stride_kn, stride_ckn, stride_cvn, row_index,
            rows, first, second, slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col,
            num_rows, num_cols, start, middle, D, DV, BLOCK_N, CAUSAL, MASKED, False,
        )  # fmt: skip
    acc = query_sweep(
        acc, q_tile, grad_tile, logsum, delta, k, plain_k, plain_v, stride_kn, stride_ckn, stride_cvn, row_index,
        rows, first, second, slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col,
        num_rows, num_cols, middle, stop, D, DV, BLOCK_N, CAUSAL, MASKED, True,
    )  # fmt: skip
    grad_q += wide_batch * stride_dqb + head * stride_dqh
    tl.store(grad_q + rows[:, None] * stride_dqm + d[None, :], (acc * SCALE).to(grad_q.dtype.element_ty), mask=inside)


def key_sweep(
    grad_k, grad_v, k, plain_v, q, plain_q, grad_out, logsums, deltas, stride_qm, stride_cqm, stride_gm, head_index,
    cols, first, second, slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col,
    num_rows, num_cols, start, stop,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Σ dSᵀ q and Σ Pᵀ dO over queries start … stop of one head, for one block of keys. Tiles lie keys × queries."""
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    for m in range(start, stop, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        inside = rows < num_rows
        q_t = tl.load(q + rows[None, :] * stride_qm + d[:, None], mask=inside[None, :], other=0.0)
        grad_tile = tl.load(grad_out + rows[:, None] * stride_gm + dv[None, :], mask=inside[:, None], other=0.0)
        queries = tl.load(plain_q + rows[:, None] * stride_cqm + d[None, :], mask=inside[:, None], other=0.0)
        # a row past the end has exp2(−inf) = 0 everywhere
        logsum = tl.load(logsums + rows, mask=inside, other=float("inf"))
        delta = tl.load(deltas + rows, mask=inside, other=0.0)
        row_index = (head_index + rows.to(tl.uint32)) * num_cols
        raw = tl.dot(k, q_t, input_precision="ieee")
        grad_p = tl.dot(plain_v, tl.trans(grad_tile), input_precision="ieee")
        random = random_number(row_index[None, :] + cols[:, None].to(tl.uint32), first, second)
        level = converted_level(raw, random, slope, shift, gain, low, high, rounder)
        probability = tl.exp2(alpha * level - logsum[None, :])
        if EDGE:
            allowed = allowed_pairs(
                rows[None, :], cols[:, None], mask, stride_mask_row, stride_mask_col, num_rows, num_cols, CAUSAL, MASKED
            )
            probability = tl.where(allowed, probability, 0.0)
        grad_v = tl.dot(probability.to(grad_tile.dtype), grad_tile, grad_v, input_precision="ieee")
        grad_score = probability * (grad_p - delta[None, :])
        grad_k = tl.dot(grad_score.to(queries.dtype), queries, grad_k, input_precision="ieee")
    return grad_k, grad_v


def attention_grad_key_kernel(
    q, k, plain_q, plain_v, grad_out, logsums, deltas, ranges, keys, first_row, mask, spans, grad_k, grad_v,
    stride_qb, stride_qh, stride_qm: tl.constexpr, stride_kb, stride_kh, stride_kn: tl.constexpr,
    stride_cqb, stride_cqh, stride_cqm: tl.constexpr, stride_cvb, stride_cvh, stride_cvn: tl.constexpr,
    stride_gb, stride_gh, stride_gm: tl.constexpr, stride_dkb, stride_dkh, stride_dkn,
    stride_dvb, stride_dvh, stride_dvn, stride_mask_batch, stride_mask_row, stride_mask_col,
    stride_spans, num_rows, num_cols, SCALE: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, OUTPUT_LEVELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, batch · key heads); the first blocks are the longest under a causal mask."""
    block = tl.program_id(0)
    batch, group = tl.program_id(1) // GROUPS, tl.program_id(1) % GROUPS
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    inside = cols[:, None] < num_cols
    wide_batch = batch.to(tl.int64)
    k += wide_batch * stride_kb + group * stride_kh
    k_tile = tl.load(k + cols[:, None] * stride_kn + d[None, :], mask=inside, other=0.0)
    plain_v += wide_batch * stride_cvb + group * stride_cvh
    v_tile = tl.load(plain_v + cols[:, None] * stride_cvn + dv[None, :], mask=inside, other=0.0)
    mask += wide_batch * stride_mask_batch
    unit = range_size(ranges) * range_size(ranges + 2)
    slope, shift, gain, low, high, rounder, step, _ = converter(ranges + 6, unit, OUTPUT_LEVELS)
    alpha = step * SCALE * 1.4426950408889634
    first, second = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)

    start, stop = 0, num_rows
    middle = start  # up to here tiles are cut by a mask
    if CAUSAL:
        start = block * BLOCK_N // BLOCK_M * BLOCK_M
        middle = tl.minimum(tl.cdiv((block + 1) * BLOCK_N, BLOCK_M) * BLOCK_M, tl.maximum(num_rows, start))
    if MASKED:
        spans += batch * stride_spans + block * 2
        start, stop = tl.load(spans) // BLOCK_M * BLOCK_M, tl.load(spans + 1)
        middle = stop
    acc_k = tl.zeros((BLOCK_N, D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, DV), tl.float32)
    for member in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + member
        head_q = q + wide_batch * stride_qb + head * stride_qh
        head_plain_q = plain_q + wide_batch * stride_cqb + head * stride_cqh
        head_grad = grad_out + wide_batch * stride_gb + head * stride_gh
        line = (wide_batch * HEADS + head) * num_rows
        entry = (tl.load(first_row).to(tl.uint32) + batch.to(tl.uint32)) * HEADS + head.to(tl.uint32)
        head_index = entry * num_rows
        if CAUSAL or MASKED:
            acc_k, acc_v = key_sweep(
                acc_k, acc_v, k_tile, v_tile, head_q, head_plain_q, head_grad, logsums + line, deltas + line, stride_qm,
                stride_cqm, stride_gm, head_index, cols, first, second, slope, shift, gain, low, high, rounder, alpha,
                mask, stride_mask_row, stride_mask_col, num_rows, num_cols, start, middle,
                D, DV, BLOCK_M, CAUSAL, MASKED, True,
            )  # fmt: skip
        if not MASKED:
            acc_k, acc_v = key_sweep(
                acc_k, acc_v, k_tile, v_tile, head_q, head_plain_q, head_grad, logsums + line, deltas + line, stride_qm,
                stride_cqm, stride_gm, head_index, cols, first, second, slope, shift, gain, low, high, rounder, alpha,
                mask, stride_mask_row, stride_mask_col, num_rows, num_cols, middle, stop,
                D, DV, BLOCK_M, CAUSAL, MASKED, False,
            )  # fmt: skip
    grad_k += wide_batch * stride_dkb + group * stride_dkh
    tl.store(grad_k + cols[:, None] * stride_dkn + d[None, :], (acc_k * SCALE).to(grad_k.dtype.element_ty), mask=inside)
    grad_v += wide_batch * stride_dvb + group * stride_dvh
    tl.store(grad_v + cols[:, None] * stride_dvn + dv[None, :], acc_v.to(grad_v.dtype.element_ty), mask=inside)


def compile_kernels() -> None:
    """Make this file's functions, and those they call, Triton functions."""
    triton_attention_forward.compile_kernels()
    globals().update(vars(triton_quantiser.compiled_functions()))
    globals()["allowed_pairs"] = triton_attention_forward.allowed_pairs
    compile_in_place(globals(), query_sweep, attention_grad_query_kernel, key_sweep, attention_grad_key_kernel)
