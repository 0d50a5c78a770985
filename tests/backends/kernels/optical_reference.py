"""Optical products in float64, written element by element from the formulas and sharing nothing with the backend.

Random numbers are handed in: they are tested by themselves.
"""

import math

import torch
from torch import Tensor

F64 = torch.float64


def level(x: float, low: float, high: float, levels: int, xi: float = 0.0) -> float:
    """One converter: x within [low, high] as the nearest of `levels`, after adding ξ of a level."""
    u = (min(max(x, low), high) - low) / (high - low + 1e-8) * (levels - 1)
    q = min(max(round(u + xi), 0), levels - 1)
    return q / (levels - 1) * (high - low) + low


def lifted(x: float, low: float, high: float, lut_min: float | None) -> float:
    """The smallest magnitude of a second operand; a rounding error around 0 is 0."""
    if lut_min is None or abs(x) < 1e-12 * max(abs(low), abs(high)):
        return x
    if 0 < x < lut_min * high:
        return lut_min * high
    if -lut_min * abs(low) < x < 0:
        return -lut_min * abs(low)
    return x


def converted(x: Tensor, low: float, high: float, levels: int, lut_min: float | None = None, xi: Tensor | None = None):
    numbers = xi.flatten().tolist() if xi is not None else [0.0] * x.numel()
    values = [
        lifted(level(value, low, high, levels, noise), low, high, lut_min)
        for value, noise in zip(x.flatten().tolist(), numbers, strict=True)
    ]
    return torch.tensor(values, dtype=F64).view(x.shape)


def attention(q, k, v, allowed, scale, ranges: dict[str, tuple[float, float]], levels, lut_min, xi_scores, xi_out):
    """(out, P) for q [B, H, S, D], k and v [B, G, S_kv, D], `allowed` bool [B, 1, S, S_kv]; a head at a time."""
    batch, heads, queries, _ = q.shape
    repeat, keys = heads // k.shape[1], k.shape[2]
    out, weights = (
        torch.zeros(*q.shape[:3], v.shape[-1], dtype=F64),
        torch.zeros(batch, heads, queries, keys, dtype=F64),
    )
    for b in range(batch):
        for h in range(heads):
            qh = converted(q[b, h].double(), *ranges["q"], levels)
            kh = converted(k[b, h // repeat].double(), *ranges["k"], levels, lut_min)
            vh = converted(v[b, h // repeat].double(), *ranges["v"], levels, lut_min)
            scores = converted(qh @ kh.T, *ranges["scores"], levels, xi=xi_scores[b, h])
            for i in range(queries):
                visible = [j for j in range(keys) if allowed[b, 0, i, j]]
                if not visible:
                    continue
                top = max(float(scores[i, j]) for j in visible)
                powers = {j: math.exp((float(scores[i, j]) - top) * scale) for j in visible}
                for j, power in powers.items():
                    weights[b, h, i, j] = power / sum(powers.values())
            out[b, h] = converted(
                converted(weights[b, h], 0.0, 1.0, levels) @ vh, *ranges["out"], levels, xi=xi_out[b, h]
            )
    return out, weights
