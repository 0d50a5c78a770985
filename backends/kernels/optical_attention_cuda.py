"""Optical attention on a GPU: `optical_attention.py` as two operators made of Triton kernels.

A `triton_op` is one operator with a schema in a captured graph, and becomes its kernels and the plain operators around
them when the graph is lowered: Inductor compiles them with its own, and their binaries travel in the region. They are
registered when first needed, so that nothing here needs Triton before.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from backends.kernels import triton_attention_backward, triton_attention_forward
from backends.kernels.dither import Key
from backends.kernels.observe import extremes
from backends.kernels.quantise import Range, quantise

# Triton functions of the two files of kernels, under these names once registered.
attention_forward_kernel: Any = None
attention_grad_query_kernel: Any = None
attention_grad_key_kernel: Any = None


def attention_with_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    ranges: tuple[Tensor, ...],
    dither: tuple[Key, Key],
    first_row: Tensor,
    levels: tuple[int, int],
    lut_min: float | None,
    *,
    observe: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`optical_attention` on a GPU. `dither`: the keys for scores and out; `levels`: of converters in and out."""
    register()
    if mask is not None:
        mask = mask.expand(mask.shape[0], 1, q.shape[2], k.shape[2])
    keys, packed = torch.stack([*_kernel_words(dither[0]), *_kernel_words(dither[1])]), torch.stack(ranges)
    out, seen = _AttentionWithKernels.apply(
        q, k, v, packed, keys, first_row, mask, scale, is_causal, *levels, lut_min, observe
    )
    return out, tuple(seen.unbind()) if observe else ()


class _AttentionWithKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        save = any(ctx.needs_input_grad)
        out, plain_out, logsums, seen = torch.ops.substrate.optical_attention_forward(q, k, v, *arguments, save)
        if save:
            ctx.arguments = arguments[4:-1]
            ctx.save_for_backward(q, k, v, plain_out, logsums, *arguments[:4])
        ctx.mark_non_differentiable(seen)
        return out, seen

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = torch.ops.substrate.optical_attention_backward(grad, *ctx.saved_tensors, *ctx.arguments)
        return (*gradients, *(None for _ in ctx.needs_input_grad[3:]))


def optical_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    keys: Tensor,
    first_row: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    input_levels: int,
    output_levels: int,
    lut_min: float | None,
    observe: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax · v unquantised, log₂ of the softmax denominators [B, H, S], ranges seen [10]).

    q [B, H, S, D], k, v [B, G, S_kv, D]; ranges float32 [10] of q, k, v, scores, out; keys int32 [4]: `_kernel_words`
    of the dither of scores and of out. Without `save` the second and third are empty, without `observe` the fourth is.
    """
    from torch.library import wrap_triton

    batch, heads, queries, head_dim = q.shape
    groups, length, value_dim = *k.shape[1:3], v.shape[-1]
    light_q, light_k = _light(q, ranges[0:2], input_levels, None), _light(k, ranges[2:4], input_levels, lut_min)
    light_v = _light(v, ranges[4:6], input_levels, lut_min)
    v, (rows, cols, warps, stages) = _readable(v), forward_tiles(head_dim)
    spans, stride_spans = _spans(mask, rows, ranges)
    # heads of one token side by side: the layer that follows wants them so
    out = q.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
    plain_out = torch.empty_like(out) if save else out.new_empty(0)
    logsums = ranges.new_empty((batch, heads, queries) if save else 0)
    blocks = -(-queries // rows)
    extreme = ranges.new_empty((batch * heads * blocks, 4) if observe else 0)
    causal, masked = is_causal and mask is None and queries > 1, mask is not None
    wrap_triton(attention_forward_kernel)[(blocks, batch * heads)](
        light_q, light_k, light_v, v, ranges, keys, first_row, q if mask is None else mask, spans,
        out, plain_out, logsums, extreme,
        *_strides(light_q, light_k, light_v, v, out), *_mask_strides(mask), stride_spans, queries, length,
        scale, heads, groups, head_dim, value_dim, input_levels, output_levels, rows, cols, causal, masked, save,
        observe, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if not observe:
        return out, plain_out, logsums, extreme
    scores_low, negated_scores_high, out_low, negated_out_high = extreme.amin(0).unbind()
    seen = (*extremes(q), *extremes(k), *extremes(v), scores_low, -negated_scores_high, out_low, -negated_out_high)
    return out, plain_out, logsums, torch.stack(seen)


def optical_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plain_out: Tensor,
    logsums: Tensor,
    ranges: Tensor,
    keys: Tensor,
    first_row: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    input_levels: int,
    output_levels: int,
    lut_min: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v, from what `optical_attention_forward` took and saved."""
    from torch.library import wrap_triton

    batch, heads, queries, head_dim = q.shape
    groups, length, value_dim = *k.shape[1:3], v.shape[-1]
    light_q, light_k = _light(q, ranges[0:2], input_levels, None), _light(k, ranges[2:4], input_levels, lut_min)
    causal, masked = is_causal and mask is None and queries > 1, mask is not None
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    grad, q, k, v = (_readable(x) for x in (grad, q, k, v))
    deltas, any_mask = torch.empty_like(logsums), q if mask is None else mask
    rows, cols, warps, stages = grad_query_tiles(head_dim)
    spans, stride_spans = _spans(mask, rows, ranges)
    wrap_triton(attention_grad_query_kernel)[(-(-queries // rows), batch * heads)](
        light_q, light_k, k, v, grad, plain_out, logsums, ranges, keys, first_row, any_mask, spans, grad_q, deltas,
        *_strides(light_q, light_k, k, v, grad, plain_out, grad_q), *_mask_strides(mask), stride_spans, queries, length,
        scale, heads, groups, head_dim, value_dim, output_levels, rows, cols, causal, masked,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    rows, cols, warps, stages = grad_key_tiles(head_dim)
    spans, stride_spans = _spans(None if mask is None else mask.transpose(-1, -2), cols, ranges)
    wrap_triton(attention_grad_key_kernel)[(-(-length // cols), batch * groups)](
        light_q, light_k, q, v, grad, logsums, deltas, ranges, keys, first_row, any_mask, spans, grad_k, grad_v,
        *_strides(light_q, light_k, q, v, grad, grad_k, grad_v), *_mask_strides(mask), stride_spans, queries, length,
        scale, heads, groups, head_dim, value_dim, output_levels, rows, cols, causal, masked,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def forward_tiles(head_dim: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, pipeline stages. Fixed by shape: a run never tries several."""
    return (64, 64, 4, 3) if head_dim <= 64 else (64, 64, 4, 2)


def grad_query_tiles(head_dim: int) -> tuple[int, int, int, int]:
    """As `forward_tiles`, for dQ."""
    return (64, 64, 4, 2) if head_dim <= 64 else (64, 32, 4, 2)


def grad_key_tiles(head_dim: int) -> tuple[int, int, int, int]:
    """As `forward_tiles`, for dK and dV."""
    return (32, 64, 4, 2) if head_dim <= 64 else (32, 128, 8, 2)


def _kernel_words(key: Key) -> tuple[Tensor, Tensor]:
    """The words of a key, each with its own share of the xor-shift that follows where it is injected.

    (w ^ key) ^ (w ^ key) >> n is w ^ w >> n ^ (key ^ key >> n): with the bracket given, one instruction of a kernel.
    """
    return key.first ^ (key.first >> 16 & 0xFFFF), key.second ^ (key.second >> 15 & 0x1FFFF)


def _light(x: Tensor, ends: Tensor, levels: int, lut_min: float | None) -> Tensor:
    """The operand as the light carries it, divided by its range's larger end, in float16 (float32 for float32)."""
    bounds, dtype = Range(*ends.unbind()), torch.float32 if x.dtype == torch.float32 else torch.float16
    return _readable((quantise(x.to(torch.float32), bounds, levels, lut_min) / bounds.size()).to(dtype))


def _readable(x: Tensor) -> Tensor:
    """x with elements of its last dim side by side, as the kernels read them; a gradient may be an expanded number."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    """Of dims 0, 1, 2; the last one is 1 wherever a kernel reads or writes."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int]:
    """Elements from one batch entry, query and key to the next; 0 where the mask is broadcast."""
    if mask is None:
        return 0, 0, 0
    return (mask.stride(0) if len(mask) > 1 else 0), mask.stride(-2), mask.stride(-1)


def _spans(mask: Tensor | None, block: int, stand_in: Tensor) -> tuple[Tensor, int]:
    """For each block of the mask's dim −2, the first and one past the last attended index of dim −1.

    int32 [B, blocks, 2], and the elements from one batch entry to the next. Sweeping over a span costs what the mask
    lets through, be it causal or articles. Without a mask the kernel reads none.
    """
    if mask is None:
        return stand_in, 0
    batch, _, queries, keys = mask.shape
    blocks = -(-queries // block)
    padded = torch.nn.functional.pad(mask[:, 0], (0, 0, 0, blocks * block - queries))
    attended = padded.reshape(batch, blocks, block, keys).any(2)
    index = torch.arange(keys, dtype=torch.int32, device=mask.device)
    first = torch.where(attended, index, keys).amin(-1)
    last = torch.where(attended, index + 1, 0).amax(-1)
    return torch.stack((first, last), -1).to(torch.int32), 2 * blocks if batch > 1 else 0


@functools.cache
def register() -> None:
    """Define substrate::optical_attention_forward and substrate::optical_attention_backward."""
    from torch.library import triton_op
    from torch.utils.flop_counter import register_flop_formula

    triton_attention_backward.compile_kernels()
    globals()["attention_forward_kernel"] = triton_attention_forward.attention_forward_kernel
    globals()["attention_grad_query_kernel"] = triton_attention_backward.attention_grad_query_kernel
    globals()["attention_grad_key_kernel"] = triton_attention_backward.attention_grad_key_kernel
    for function in (optical_attention_forward, optical_attention_backward):
        triton_op(f"substrate::{function.__name__}", function, mutates_args=())
    operators = torch.ops.substrate
    register_flop_formula(operators.optical_attention_forward)(_forward_flops)
    register_flop_formula(operators.optical_attention_backward)(_backward_flops)


def _forward_flops(q: Any, k: Any, v: Any, _r: Any, _k: Any, _f: Any, mask: Any, _s: Any, is_causal: bool, *_: Any, **__: Any) -> int:  # fmt: skip  # noqa: E501
    """Those of plain attention, from shapes: recomputed scores are not counted, half of the square if causal."""
    batch, heads, queries, head_dim = q
    pairs = batch * heads * queries * k[2]
    return 2 * pairs * (head_dim + v[3]) // (2 if is_causal and mask is None and queries > 1 else 1)


def _backward_flops(_grad: Any, q: Any, k: Any, v: Any, _p: Any, _l: Any, *rest: Any, **_: Any) -> int:
    return _forward_flops(q, k, v, *rest) * 5 // 2
