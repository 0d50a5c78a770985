"""Cross entropy and the logits' gradient in one pass over the logits, on a GPU: an operator made of a Triton kernel.

With Z a row's softmax denominator, x its logits, p its softmax, c its scale and V the vocabulary:

    CE = log Z − x_label,   objective = CE + ε (x_label − mean x) + z log² Z
    gradient of c · objective = c (p (1 + 2 z log Z) − (1 − ε) [label] − ε / V)

in float32 whatever the logits' dtype. `compiled/objective.py` has the same in plain torch, for every other device.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from backends.kernels import triton_cross_entropy
from backends.kernels.in_capture import takes_kernels

cross_entropy_kernel: Any = None  # the Triton function, once registered


def has_kernel(logits: Tensor, computed: torch.dtype) -> bool:
    """Whether the operator takes these logits where they are meant to count as numbers of dtype `computed`."""
    return (
        takes_kernels(logits)
        and logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and computed.itemsize <= 4
    )


def cross_entropy_and_gradient(
    logits: Tensor,
    labels: Tensor,
    grad_scale: Tensor,
    label_smoothing: Tensor | None = None,
    z_loss: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(CE [T], objective [T], gradient of Σ grad_scale · objective for the logits [T, V]).

    logits [T, V]; labels int64 [T], one outside 0 … V − 1 counts as a logit of 0; grad_scale [T], where it is 0 so
    are all three; the two numbers 0-d. CE and objective are float32, the objective empty without the two numbers.
    """
    register()
    return torch.ops.substrate.cross_entropy_gradient(logits, labels, grad_scale, label_smoothing, z_loss)


def cross_entropy_gradient(
    logits: Tensor, labels: Tensor, grad_scale: Tensor, label_smoothing: Tensor | None, z_loss: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from torch.library import wrap_triton

    rows, vocabulary = logits.shape
    # A compiler drops the copy where nothing else reads the logits: the kernel then writes over them.
    gradient = logits.clone(memory_format=torch.contiguous_format)
    entropies = torch.empty(rows, dtype=torch.float32, device=logits.device)
    smoothed, penalised = label_smoothing is not None, z_loss is not None
    objectives = torch.empty(rows if smoothed or penalised else 0, dtype=torch.float32, device=logits.device)
    tile, warps, stages = tiles(vocabulary)
    wrap_triton(cross_entropy_kernel)[(rows,)](
        gradient, labels, grad_scale,
        grad_scale if label_smoothing is None else label_smoothing, grad_scale if z_loss is None else z_loss,
        entropies, objectives, vocabulary, tile, stages, smoothed, penalised, num_warps=warps,
    )  # fmt: skip
    return entropies, objectives, gradient


def tiles(vocabulary: int) -> tuple[int, int, int]:
    """Logits of a tile, warps, pipeline stages. Fixed by shape: a run never tries several."""
    tile = min(8192, max(128, 1 << (vocabulary - 1).bit_length()))
    return tile, max(tile // 1024, 1), 1


@functools.cache
def register() -> None:
    """Define substrate::cross_entropy_gradient."""
    from torch.library import triton_op

    globals()["cross_entropy_kernel"] = triton_cross_entropy.compiled_kernel()
    triton_op("substrate::cross_entropy_gradient", cross_entropy_gradient, mutates_args=())
