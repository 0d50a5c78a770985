"""training.distill.*: a frozen teacher, read as a run's own model is, and what of its predictions is minimised.

The teacher computes with the run's dtypes and dense layers (or those its own checkpoint stores); its blocks may be of
any size and number, its vocabulary has to be the model's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import modelzoo
from apps.training.config_schema import DistillConfig, TrainConfig
from apps.training.progress import Progress
from backends.errors import UserError
from backends.routing import route


def teacher_config(config: TrainConfig, vocab_size: int) -> Any | None:
    """The zoo config of the teacher; None without one. UserError for a folder that is none, or another vocabulary."""
    settings, model = config.training.distill, config.model
    folder = settings.model_name_or_path
    if folder is None:
        for key in ("weight", "temperature"):
            if getattr(settings, key) != getattr(DistillConfig(), key):
                raise UserError(
                    f"training.distill.{key} was given, but there is no teacher. Set "
                    "training.distill.model_name_or_path too."
                )
        return None
    try:
        found = modelzoo.load_config(
            model_name_or_path=folder,
            compute_dtype=model.compute_dtype,
            norm_dtype=model.norm_dtype,
            residual_dtype=model.residual_dtype,
            logits_dtype=model.logits_dtype,
            article_attention=model.article_attention,
            max_seq_length=model.max_seq_length,
        )
    except UserError as error:
        named = str(error).replace("checkpoint.model_name_or_path", "training.distill.model_name_or_path")
        raise UserError(f"The teacher: {named}") from None
    if found.vocab_size != vocab_size:
        raise UserError(
            f"training.distill.model_name_or_path={folder} has a vocabulary of {found.vocab_size} tokens, the "
            f"model one of {vocab_size}. Expected a teacher of the same tokenizer."
        )
    return found


def teacher_backends(found: Any, dtype: str) -> dict[str, Any]:
    """What computes the teacher's layers, which its own checkpoint says: the source's fingerprint of each backend."""
    rows = route(modelzoo.build_meta(found, dtype=dtype)).routes
    return {"backends": {str(row.backend): row.backend.fingerprint()[:12] for row in rows}}


def load_teacher(config: TrainConfig, found: Any, device: torch.device) -> Any:
    """The teacher with its weights on `device`, frozen and in evaluation mode. UserError where they do not fit."""
    folder = str(config.training.distill.model_name_or_path)
    with Progress(None, f"Loading {folder}", "bytes", mode=config.logging.progress) as progress:
        model = modelzoo.load_model(folder, found, device=device, dtype=config.model.dtype, progress=progress.show)
    return model.eval().requires_grad_(False)


def divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ model) of each token, both softened by T (Hinton et al., arXiv 1503.02531): [T, V] → [T]."""
    ours, theirs = (F.log_softmax(each / temperature, -1) for each in (logits, teacher_logits))
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
