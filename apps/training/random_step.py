"""A step on random tokens: what is timed and profiled, since the tokens change none of the work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apps.training.hyperparameters import hyperparameter_table
from apps.training.step_plan import StepPlan
from backends.precision import as_torch, at_least_float32

ARTICLE_TOKENS = 512  # of an article on average, where attention stays inside articles


def random_batch(plan: StepPlan, device: torch.device, accumulation: int = 1) -> dict[str, Tensor]:
    """A microbatch [B, S] of random tokens of which every position counts, in articles of random lengths.

    `accumulation`: microbatches of its step.
    """
    shape = (plan.spec.batch_size, plan.spec.max_seq_length)
    ids = torch.randint(0, plan.model_config.vocab_size, shape, device=device)
    labels = torch.randint(0, plan.model_config.vocab_size, shape, device=device)
    dtype = as_torch(at_least_float32(plan.precision.logits))  # as Trainer.loss_dtype
    scale = torch.full(shape, 1 / (accumulation * ids.numel()), device=device, dtype=dtype)
    batch = {"input_ids": ids, "labels": labels, "grad_scale": scale}
    if plan.spec.article_attention:
        # each token opens an article with the chance that gives their mean length
        opens = torch.rand(shape) < 1 / ARTICLE_TOKENS
        batch["article_ids"] = (1 + opens.cumsum(1, dtype=torch.int32)).to(device)
    return batch


def first_hyperparameters(plan: StepPlan, model: Any, device: torch.device) -> Tensor:
    """The table of numbers for a first step at rate 1e-4."""
    names, dtype = [name for name, _ in model.named_parameters()], as_torch(at_least_float32(plan.precision.parameters))
    seed = 0 if plan.precision.rounding == "stochastic" else None
    return hyperparameter_table(names, plan.groups, step=1, rate=lambda peak: 1e-4, dtype=dtype, rounding_seed=seed).to(
        device
    )
