"""Which of PyTorch's attention kernels a trace takes."""

import contextlib
from typing import Any

import torch

from compiled.lowering import fake_mode


def mistakes_attention_for_float32(device_type: str, dtype: str) -> bool:
    """Whether this torch (2.11) traces what the CPU's kernel keeps for its backward as float32 where it is float64."""
    if (device_type, dtype) != ("cpu", "float64"):
        return False
    with fake_mode():
        query = torch.empty(1, 1, 2, 8, dtype=torch.float64)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, query, query)[1].dtype != query.dtype


def attention_context(device_type: str, *, as_products: bool = False) -> contextlib.AbstractContextManager[Any]:
    """The attention kernels a trace may pick. On CUDA cuDNN first: 1.43 ms, flash 2.26, at 8x32x2048x64 on one H200.

    `as_products`: no kernel, but the two products and the softmax between them.
    """
    if device_type != "cuda" and not as_products:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if as_products:
        return sdpa_kernel([SDPBackend.MATH])
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)
