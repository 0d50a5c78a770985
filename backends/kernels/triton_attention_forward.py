"""Triton: optical attention, forward, without a scores tensor in memory.

One program takes BLOCK_M queries of one head and sweeps over the keys twice: the first sweep finds each row's softmax
denominator (and softmax · v unquantised, which the backward wants), the second sums the quantised probabilities.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

from typing import Any

from backends.kernels import triton_quantiser
from backends.kernels.triton_functions import compile_in_place

tl: Any = None
range_size: Any = None
converter: Any = None
random_number: Any = None
converted_level: Any = None


def allowed_pairs(
    rows, cols, mask, stride_mask_row, stride_mask_col, num_rows, num_cols, CAUSAL: tl.constexpr, MASKED: tl.constexpr
):
    """Which of rows × cols may attend: `rows` and `cols` broadcast against each other."""
    allowed = (cols < num_cols) & (rows < num_rows)
    if CAUSAL:
        allowed &= cols <= rows
    if MASKED:
        allowed &= tl.load(mask + rows * stride_mask_row + cols * stride_mask_col, mask=allowed, other=0) != 0
    return allowed


def first_sweep(
    acc, top, bottom, total, reference, q, k, v, stride_kn, stride_vn, row_index, rows, first, second,
    slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col, num_rows, num_cols,
    start, stop, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    EDGE: tl.constexpr, SAVE: tl.constexpr, OBSERVE: tl.constexpr,
):  # fmt: skip
    """Keys start … stop: row maxima and minima of the raw scores, softmax denominators, unnormalised softmax · v."""
    infinity = float("inf")
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        if EDGE:
            k_t = tl.load(k + cols[None, :] * stride_kn + d[:, None], mask=cols[None, :] < num_cols, other=0.0)
        else:
            k_t = tl.load(k + cols[None, :] * stride_kn + d[:, None])
        raw = tl.dot(q, k_t, input_precision="ieee")
        logits = alpha * converted_level(
            raw,
            random_number(row_index[:, None] + cols[None, :].to(tl.uint32), first, second),
            slope,
            shift,
            gain,
            low,
            high,
            rounder,
        )
        largest = raw
        if EDGE:
            allowed = allowed_pairs(
                rows[:, None], cols[None, :], mask, stride_mask_row, stride_mask_col, num_rows, num_cols, CAUSAL, MASKED
            )
            largest = tl.where(allowed, raw, -infinity)
            logits = tl.where(allowed, logits, -infinity)
        top = tl.maximum(top, tl.max(largest, 1))
        if OBSERVE:
            smallest = raw
            if EDGE:
                smallest = tl.where(allowed, raw, infinity)
            bottom = tl.minimum(bottom, tl.min(smallest, 1))
        # the largest raw score, clamped, is within a level of the largest quantised one: good enough not to overflow
        renewed = tl.minimum(tl.maximum(top * slope + shift + 1.5 * gain, low), high) * alpha
        renewed = tl.maximum(tl.maximum(renewed, -1e30), reference)
        weights = tl.exp2(logits - renewed[:, None])
        correction = tl.exp2(reference - renewed)
        reference = renewed
        total = total * correction + tl.sum(weights, 1)
        if SAVE:
            if EDGE:
                values = tl.load(v + cols[:, None] * stride_vn + dv[None, :], mask=cols[:, None] < num_cols, other=0.0)
            else:
                values = tl.load(v + cols[:, None] * stride_vn + dv[None, :])
            acc = tl.dot(weights.to(values.dtype), values, acc * correction[:, None], input_precision="ieee")
    return acc, top, bottom, total, reference


def second_sweep(
    acc, logsum, q, k, v, stride_kn, stride_vn, row_index, rows, first, second,
    slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col, num_rows, num_cols,
    start, stop, D: tl.constexpr, DV: tl.constexpr, INPUT_LEVELS: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Keys start … stop: Σ level(probability) · v, with v quantised and normalised."""
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    for n in range(start, stop, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        if EDGE:
            k_t = tl.load(k + cols[None, :] * stride_kn + d[:, None], mask=cols[None, :] < num_cols, other=0.0)
            values = tl.load(v + cols[:, None] * stride_vn + dv[None, :], mask=cols[:, None] < num_cols, other=0.0)
        else:
            k_t = tl.load(k + cols[None, :] * stride_kn + d[:, None])
            values = tl.load(v + cols[:, None] * stride_vn + dv[None, :])
        raw = tl.dot(q, k_t, input_precision="ieee")
        logits = alpha * converted_level(
            raw,
            random_number(row_index[:, None] + cols[None, :].to(tl.uint32), first, second),
            slope,
            shift,
            gain,
            low,
            high,
            rounder,
        )
        probability = tl.exp2(logits - logsum[:, None])
        if EDGE:
            allowed = allowed_pairs(
                rows[:, None], cols[None, :], mask, stride_mask_row, stride_mask_col, num_rows, num_cols, CAUSAL, MASKED
            )
            probability = tl.where(allowed, probability, 0.0)
        level = (probability * (INPUT_LEVELS - 1) + 12582912.0) - 12582912.0
        if INPUT_LEVELS > 2049:  # more than float16 tells apart: the rounding of the operand is finer than the levels
            level *= 1.0 / (INPUT_LEVELS - 1)
        acc = tl.dot(level.to(values.dtype), values, acc, input_precision="ieee")
    return acc


def attention_forward_kernel(
    q, k, v, plain_v, ranges, keys, first_row, mask, spans,
    out, plain_out, logsums, observed,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    stride_pb, stride_ph, stride_pn, stride_ob, stride_oh, stride_om,
    stride_mask_batch, stride_mask_row, stride_mask_col,
    stride_spans, num_rows, num_cols, SCALE: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr,
    INPUT_LEVELS: tl.constexpr, OUTPUT_LEVELS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, SAVE: tl.constexpr, OBSERVE: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, batch · heads). q, k, v: quantised, normalised; plain_v: as given."""
    infinity = float("inf")
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the last blocks are the longest: start them
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    group = head // (HEADS // GROUPS)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    inside = rows[:, None] < num_rows
    q_tile = tl.load(
        q + batch.to(tl.int64) * stride_qb + head * stride_qh + rows[:, None] * stride_qm + d[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip
    k += batch.to(tl.int64) * stride_kb + group * stride_kh
    v += batch.to(tl.int64) * stride_vb + group * stride_vh
    plain_v += batch.to(tl.int64) * stride_pb + group * stride_ph
    mask += batch.to(tl.int64) * stride_mask_batch
    score_unit = range_size(ranges) * range_size(ranges + 2)
    slope, shift, gain, low, high, rounder, step, _ = converter(ranges + 6, score_unit, OUTPUT_LEVELS)
    alpha = step * SCALE * 1.4426950408889634  # exponents of 2
    entry = (tl.load(first_row).to(tl.uint32) + batch.to(tl.uint32)) * HEADS + head.to(tl.uint32)
    out_index = entry * num_rows + rows.to(tl.uint32)
    row_index = out_index * num_cols
    first, second = tl.load(keys).to(tl.uint32), tl.load(keys + 1).to(tl.uint32)

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

    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    top = tl.full((BLOCK_M,), -infinity, tl.float32)
    bottom = tl.full((BLOCK_M,), infinity, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    reference = tl.full((BLOCK_M,), -1e30, tl.float32)
    if not MASKED:
        acc, top, bottom, total, reference = first_sweep(
            acc, top, bottom, total, reference, q_tile, k, plain_v, stride_kn, stride_pn, row_index, rows,
            first, second, slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col,
            num_rows, num_cols, start, middle, D, DV, BLOCK_N, CAUSAL, MASKED, False, SAVE, OBSERVE,
        )  # fmt: skip
    acc, top, bottom, total, reference = first_sweep(
        acc, top, bottom, total, reference, q_tile, k, plain_v, stride_kn, stride_pn, row_index, rows, first, second,
        slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col, num_rows, num_cols,
        middle, stop, D, DV, BLOCK_N, CAUSAL, MASKED, True, SAVE, OBSERVE,
    )  # fmt: skip
    # a row that attends to nothing: its probabilities are exp2(−inf) = 0
    logsum = tl.where(total > 0.0, reference + tl.log2(total), infinity)
    place = batch.to(tl.int64) * stride_ob + head * stride_oh + rows[:, None] * stride_om + dv[None, :]
    if SAVE:
        scaled = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(plain_out + place, scaled.to(plain_out.dtype.element_ty), mask=inside)
        tl.store(logsums + tl.program_id(1).to(tl.int64) * num_rows + rows, logsum, mask=rows < num_rows)

    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    if not MASKED:
        acc = second_sweep(
            acc, logsum, q_tile, k, v, stride_kn, stride_vn, row_index, rows, first, second,
            slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col, num_rows, num_cols,
            start, middle, D, DV, INPUT_LEVELS, BLOCK_N, CAUSAL, MASKED, False,
        )  # fmt: skip
    acc = second_sweep(
        acc, logsum, q_tile, k, v, stride_kn, stride_vn, row_index, rows, first, second,
        slope, shift, gain, low, high, rounder, alpha, mask, stride_mask_row, stride_mask_col, num_rows, num_cols,
        middle, stop, D, DV, INPUT_LEVELS, BLOCK_N, CAUSAL, MASKED, True,
    )  # fmt: skip
    value_unit = range_size(ranges + 4)
    if INPUT_LEVELS <= 2049:
        value_unit /= INPUT_LEVELS - 1
    if OBSERVE:
        observed += (tl.program_id(1) * tl.num_programs(0) + block) * 4
        valid = rows < num_rows
        tl.store(observed, tl.min(tl.where(valid, bottom, infinity), 0) * score_unit)
        tl.store(observed + 1, -tl.max(tl.where(valid, top, -infinity), 0) * score_unit)
        tl.store(observed + 2, tl.min(tl.min(tl.where(inside, acc, infinity), 1), 0) * value_unit)
        tl.store(observed + 3, -tl.max(tl.max(tl.where(inside, acc, -infinity), 1), 0) * value_unit)
    slope, shift, gain, low, high, rounder, step, base = converter(ranges + 8, value_unit, OUTPUT_LEVELS)
    first, second = tl.load(keys + 2).to(tl.uint32), tl.load(keys + 3).to(tl.uint32)
    random = random_number((out_index * DV)[:, None] + dv[None, :].to(tl.uint32), first, second)
    result = converted_level(acc, random, slope, shift, gain, low, high, rounder) * step + base
    tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)


def compile_kernels() -> None:
    """Make this file's functions Triton functions."""
    globals().update(vars(triton_quantiser.compiled_functions()))
    compile_in_place(globals(), allowed_pairs, first_sweep, second_sweep, attention_forward_kernel)
