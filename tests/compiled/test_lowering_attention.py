"""Which attention kernels a trace takes, and when it takes none."""

import torch

from compiled.lowering import fake_mode
from compiled.lowering_attention import attention_context, mistakes_attention_for_float32


def test_kernels_are_chosen_on_cuda_only() -> None:
    with attention_context("cpu"):
        assert torch.backends.cuda.math_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    with attention_context("cpu", as_products=True):
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()


def test_what_a_trace_says_of_the_kernels_results_is_what_it_gives() -> None:
    """Or else the question says so, and products are traced instead."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        query = torch.randn(1, 1, 2, 8, dtype=dtype)
        with fake_mode() as mode:
            traced = [each.dtype for each in attention(*[mode.from_tensor(query)] * 3)]
        agree = traced == [each.dtype for each in attention(query, query, query)]
        assert agree != mistakes_attention_for_float32("cpu", str(dtype).removeprefix("torch."))
