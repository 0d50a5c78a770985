"""One pass each for norm, rotation and gate where a model on a GPU reads or writes text, in 16-bit numbers.

Plain operators take nine passes over the hidden states for a norm with the sum before it and five for a rotation: as
long as the products of a long prompt, and most of what is launched for a token. Each operation here gives None where
its plain form is to be computed, which is everywhere but inside `inference_kernels`. The kernels round intermediate
results where plain operators round them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from backends.kernels import triton_inference

WIDEST = 16384  # what a program can hold of a row
HALVES = (torch.bfloat16, torch.float16)
BLOCK = 1024
_device: ContextVar[torch.device | None] = ContextVar("inference_kernels", default=None)
logger = logging.getLogger(__name__)


@contextmanager
def inference_kernels(hidden_states: Tensor) -> Iterator[None]:
    """Inside, kernels are launched for tensors on the device of `hidden_states`, if it is a GPU on which they work.

    Not where something is differentiated, traced or compiled.
    """
    device = hidden_states.device
    is_plain = type(hidden_states) in (Tensor, nn.Parameter)
    if device.type != "cuda" or torch.is_grad_enabled() or not is_plain or not _work_on(device):
        yield
        return
    before = _device.set(device)
    try:
        with torch.cuda.device(device):  # Triton launches on the current one
            yield
    finally:
        _device.reset(before)


def add_rms_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    epsilon: float,
    norm_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """(x + update in the dtype of x, its RMSNorm in `compute_dtype`), normalised in float32; x [..., D], weight [D].

    `update` is of the shape of x, None: nothing is added.
    """
    width = x.shape[-1]
    takes_dtypes = norm_dtype == torch.float32 and compute_dtype in HALVES and x.dtype.itemsize <= 4
    if not _launches_for(x) or not takes_dtypes or width > WIDEST:
        return None
    x = x.contiguous()
    added = x if update is None else update.contiguous()
    total = x if update is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=compute_dtype)
    block = 1 << (width - 1).bit_length()
    _kernels()[0][(x.numel() // width,)](
        x, added, weight, total, normed, epsilon, width, block, update is not None,
        num_warps=min(8, max(1, block // 512)),
    )  # fmt: skip
    return total, normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """x [B, heads, S, head_dim] by the angles of cos and sin, [S, head_dim] or [B, S, head_dim]; laid out like x."""
    if not _launches_for(x) or x.dtype not in HALVES or not x.dtype == cos.dtype == sin.dtype:
        return None
    batch, heads, length, head_dim = x.shape
    if x.stride(-1) != 1 or head_dim % 2 or cos.dim() != sin.dim() or cos.shape[-2] != length:
        return None
    cos, sin = cos.contiguous(), sin.contiguous()
    turned = torch.empty_like(x)
    half = head_dim // 2
    tile = min(32, 1 << (heads - 1).bit_length())
    of_row = 0 if cos.dim() == 2 or cos.shape[0] == 1 else cos.stride(0)
    _kernels()[1][(batch * length, -(-heads // tile))](
        x, cos, sin, turned, heads, length, *x.stride()[:3], *turned.stride()[:3], of_row, cos.stride(-2),
        half, 1 << (half - 1).bit_length(), tile,
        enable_fp_fusion=False,  # else a product in 16 bits and its sum are one operation, rounded once
    )  # fmt: skip
    return turned


def gated_silu(gate: Tensor, up: Tensor) -> Tensor | None:
    """silu(gate) · up, of equal shapes and dtypes."""
    if not _launches_for(gate) or gate.dtype not in HALVES or gate.dtype != up.dtype or gate.shape != up.shape:
        return None
    gate, up = gate.contiguous(), up.contiguous()
    gated = torch.empty_like(gate)
    _kernels()[2][(-(-gate.numel() // BLOCK),)](gate, up, gated, gate.numel(), BLOCK)
    return gated


def _launches_for(x: Tensor) -> bool:
    return not torch.compiler.is_compiling() and x.device == _device.get() and x.numel() > 0


@functools.cache
def _work_on(device: torch.device) -> bool:
    """Whether the kernels can be made for `device`: Triton is there, and what it needs to build its launchers."""
    before = _device.set(device)
    try:
        with torch.cuda.device(device):
            x = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16, device=device)
            add_rms_norm(x, x, x[0, 0, 0], 1e-6, torch.float32, torch.bfloat16)
            rotate(x, x[0, 0], x[0, 0])
            gated_silu(x, x)
            torch.cuda.synchronize(device)
    except Exception as error:  # of many kinds: no C compiler, a full disk, a GPU that Triton does not know
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning("Triton's kernels do not work on %s, so that text takes longer: %s", device, reason)
        return False
    finally:
        _device.reset(before)
    return True


_kernels = functools.cache(triton_inference.compiled_kernels)
