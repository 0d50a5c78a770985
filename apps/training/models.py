"""The model with its weights: a checkpoint's, or random ones from the seed."""

from __future__ import annotations

from typing import Any

import torch

import modelzoo
from apps.training.config_schema import TrainConfig
from apps.training.lora import add_updates
from apps.training.progress import Progress
from backends.routing import route
from modelzoo.dropout import seed_dropout


def load_weights(config: TrainConfig, model_config: Any, device: torch.device) -> Any:
    """The model of `model_config` on `device`, every layer given its backend and update. UserError for a bad folder."""
    folder = config.checkpoint.model_name_or_path
    if folder is None:
        with Progress(None, "Drawing random weights", "numbers", mode=config.logging.progress) as progress:
            model = modelzoo.build_model(
                model_config,
                device=device,
                dtype=config.model.dtype,
                seed=config.training.seed,
                progress=progress.show,
            )
    else:
        with Progress(None, f"Loading {folder}", "bytes", mode=config.logging.progress) as progress:
            model = modelzoo.load_model(
                folder, model_config, device=device, dtype=config.model.dtype, progress=progress.show
            )
    route(model, config.backend.rules, config.backend.default)
    add_updates(config.lora, model, config.training.seed)
    seed_dropout(model, config.training.seed)
    return model
