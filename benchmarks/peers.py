"""What a user would take instead: plain transformers with fused AdamW; as is, compiled, or with Liger's kernels."""

from collections.abc import Callable
from typing import Any

NAMES = ("eager", "compile", "liger")


class Missing(Exception):
    """A peer is not installed; says what it needs."""


def peer_step(
    name: str, plan: Any, device: Any, *, recomputes: bool = False, accumulation: int = 1
) -> Callable[[], None]:
    """A train step of the planned model on `accumulation` microbatches of random tokens in model.dtype, without masters
    or clipping.

    `recomputes`: by gradient checkpointing. Where the plan keeps attention inside articles the peer does, by the dense
    mask that transformers offers.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from apps.training.random_step import random_batch
    from backends.articles import article_mask
    from backends.precision import as_torch

    if name == "liger":
        patch_by_liger()
    config = LlamaConfig(**plan.spec.model)
    config._attn_implementation, config.use_cache = "sdpa", False
    torch.set_default_dtype(as_torch(plan.precision.parameters))
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.train()
    if recomputes:
        # transformers is renaming it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if name == "compile" else model
    batch = random_batch(plan, device)
    inputs = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    if "article_ids" in batch:
        inputs["attention_mask"] = article_mask(batch["article_ids"])

    def step() -> None:
        for _ in range(accumulation):
            (forward(**inputs).loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def patch_by_liger() -> None:
    """Let transformers' Llama use Liger's kernels from now on."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        raise Missing("liger-kernel is not installed") from None
    apply_liger_kernel_to_llama()
