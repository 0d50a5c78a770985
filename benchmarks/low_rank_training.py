"""A compressed model in one process: its held-out perplexity, and a short training with torch's AdamW."""

from __future__ import annotations

import copy
import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import modelzoo
from apps.training.data.loader import TrainLoader, dev_batches
from apps.training.data.packing import Rows
from apps.training.data.storage import Dataset, open_dataset
from apps.training.loss import make_batch
from backends.errors import UserError
from modelzoo.compression import compress_model

VARIANTS: dict[str, dict[str, Any]] = {
    "mimic_dense": {"method": "mimic", "targets": "dense"},
    "mimic_gradient": {"method": "mimic", "targets": "dense", "weighting": "gradient"},
}


def open_both(own: dict[str, str]) -> tuple[nn.Module, Dataset]:
    """The dense model of `own["model"]` in float32, on a GPU where there is one, and `own["dataset"]`."""
    for name in ("model", "dataset"):
        if not own[name]:
            raise UserError(f"{name} is not given. Expected {name}=DIR, see the first lines of this file.")
    config = modelzoo.load_config(model_name_or_path=own["model"])
    dense = modelzoo.load_model(own["model"], config, dtype="float32").eval()
    batch, length = int(own["batch"]), int(own["length"])
    dataset = open_dataset(
        Path(own["dataset"]), max_seq_length=length, vocab_size=config.vocab_size, batch_size=batch, evaluate=True
    )
    return dense.to("cuda" if torch.cuda.is_available() else "cpu"), dataset


def calibration_of(dense: nn.Module, dataset: Dataset, own: dict[str, str]) -> list[dict[str, object]]:
    """Batches of `own["tokens"]` in all, on the model's device."""
    batch, device = int(own["batch"]), next(dense.parameters()).device
    number = math.ceil(int(own["tokens"]) / batch / int(own["length"]))
    rows = islice(iter(TrainLoader(dataset, batch_size=batch, seed=42)), number)
    return [{"input_ids": make_batch(each).input_ids.to(device), "use_cache": False} for each in rows]


def compressed(
    dense: nn.Module, calibration: list[dict[str, object]], method: str, keep: float, allocation: str = "uniform"
) -> nn.Module:
    """A compressed copy. mimic_dense is mimic with compress.targets=dense, mimic_gradient that with
    compress.weighting=gradient.
    """
    model, choices = copy.deepcopy(dense), VARIANTS.get(method, {})
    compress_model(model, calibration, keep=keep, allocation=allocation, **{"method": method} | choices)
    return model


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the cross entropy over the counted positions, and their number."""
    logits = model(input_ids=ids, use_cache=False).logits.float()
    each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (each * mask.flatten()).sum(), mask.sum()


def placed(rows: Rows, model: nn.Module) -> list[Tensor]:
    """Ids, labels and mask of a batch on the model's device."""
    made, device = make_batch(rows), next(model.parameters()).device
    return [each.to(device, non_blocking=True) for each in (made.input_ids, made.labels, made.mask)]


@torch.no_grad()
def perplexity(model: nn.Module, dataset: Dataset, batch: int) -> float:
    model.eval()
    total = counted = 0.0
    for rows in dev_batches(dataset, batch):
        loss, number = loss_of(model, *placed(rows, model))
        total, counted = total + float(loss), counted + float(number)
    return math.exp(total / counted)


def tuned(
    model: nn.Module, dataset: Dataset, own: dict[str, str], seed: int, peak: float, *, freezes_biases: bool = False
) -> float:
    """Perplexity after `own["tune"]` steps of a copy of `model`: a linear rise to `peak` and a fall to 0, clipped to 1.

    Matrices are decayed by 0.1. `seed` orders the rows. On a GPU its float32 products are those of TF32.
    """
    model, steps = copy.deepcopy(model).train(), int(own["tune"])
    named = [(name, each) for name, each in model.named_parameters() if not (freezes_biases and name.endswith("bias"))]
    groups = [
        {"params": [each for _, each in named if each.ndim > 1], "weight_decay": 0.1},
        {"params": [each for _, each in named if each.ndim == 1], "weight_decay": 0.0},
    ]
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
    optimizer, warmup = torch.optim.AdamW(groups, lr=peak), max(1, steps // 20)
    rows = islice(iter(TrainLoader(dataset, batch_size=int(own["batch"]), seed=seed)), steps)
    for step, each in enumerate(rows, start=1):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(step / warmup, (steps - step) / max(1, steps - warmup) if step > warmup else 1.0)
        loss, number = loss_of(model, *placed(each, model))
        optimizer.zero_grad()
        (loss / number).backward()
        nn.utils.clip_grad_norm_([each for _, each in named], 1.0)
        optimizer.step()
    torch.set_float32_matmul_precision("highest")
    return perplexity(model, dataset, int(own["batch"]))
