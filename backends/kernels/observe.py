"""The range of a tensor: its extremes, or two quantiles of a sample; and how a range follows what is seen."""

from __future__ import annotations

import torch
from torch import Tensor

from backends.kernels.dither import Key, random_bits
from backends.kernels.quantise import Range

SAMPLE_SIZE = 2**14


def extremes(x: Tensor, attended: Tensor | None = None) -> Range:
    """(min, max) of x as float32, 0-d; of the elements `attended` (bool, broadcast to x) only.

    Without any, (∞, −∞). A NaN in x gives NaN.
    """
    if x.numel() == 0:
        return Range(x.new_full((), torch.inf, dtype=torch.float32), x.new_full((), -torch.inf, dtype=torch.float32))
    if attended is None:
        low, high = x.aminmax()
    else:
        low = torch.where(attended, x, torch.inf).amin()
        high = torch.where(attended, x, -torch.inf).amax()
    return Range(low.to(torch.float32), high.to(torch.float32))


def quantiles(x: Tensor, levels: tuple[float, float], key: Key, attended: Tensor | None = None) -> Range:
    """Two quantiles of x (0 ≤ level ≤ 1) as float32, 0-d, interpolated linearly; from a sample when x is large.

    Above 2¹⁴ elements, 2¹⁴ of them are drawn at random with replacement (n below; those not `attended` are left out).
    The part of x below the returned value has then the binomial standard error √(p (1 − p) / n) around the level p:
    0.0008 at p = 0.99, 0.0004 at p = 0.999, whatever the size of x. Sorting and memory stay bounded. A NaN in x
    gives NaN, and so does no element at all.
    """
    if x.numel() == 0:
        return Range(*x.new_full((2,), torch.nan, dtype=torch.float32).unbind())
    flat = x.reshape(-1)
    chosen = None if attended is None else attended.expand(x.shape).reshape(-1)
    if flat.numel() > SAMPLE_SIZE:
        counter = torch.arange(SAMPLE_SIZE, dtype=torch.int32, device=x.device)
        draw = random_bits(counter, key).to(torch.int64) & 0xFFFFFFFF
        places = (draw >> 1) * flat.numel() >> 31  # 31 bits: the product has to fit 63
        flat = flat[places]
        chosen = None if chosen is None else chosen[places]
    if chosen is None:
        last = torch.full((), flat.numel() - 1, dtype=torch.int64, device=x.device)
    else:
        flat, last = torch.where(chosen, flat, torch.inf), chosen.sum() - 1
    ordered = flat.to(torch.promote_types(x.dtype, torch.float32)).sort().values
    low, high = (_at(ordered, level, last) for level in levels)
    broken = torch.isnan(ordered[-1]) | (last < 0)  # NaN sorts last
    return Range(torch.where(broken, torch.nan, low), torch.where(broken, torch.nan, high))


def _at(ordered: Tensor, level: float, last: Tensor) -> Tensor:
    place = level * last.clamp_min(0).to(torch.float64)
    below = place.floor()
    above = torch.minimum(below.to(torch.int64) + 1, last.clamp_min(0))
    # index_select: an index that is a tensor of one element, without reading it
    first, second = ordered.index_select(0, torch.stack([below.to(torch.int64), above])).unbind()
    return torch.lerp(first, second, (place - below).to(ordered.dtype)).to(torch.float32)


def follow(old: Tensor, seen: Tensor, smooth_factor: float) -> Tensor:
    """The end of a range after a step: α · old + (1 − α) · seen; `seen` the first time; `old` where nothing was seen.

    An infinite `old` is one that is not known yet. NaN and infinities are not learned from.
    """
    moved = torch.where(torch.isfinite(old), smooth_factor * old + (1.0 - smooth_factor) * seen, seen)
    return torch.where(torch.isfinite(seen), moved, old)
