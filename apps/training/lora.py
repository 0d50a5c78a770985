"""The settings `lora.*` on a model: which layers get updates, what they start from, and what a run leaves of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modelzoo
from apps.training.config_schema import LoraConfig, TrainConfig
from backends.errors import UserError
from backends.lora import Lora, add_lora, load_lora, merge_lora
from backends.routing_table import shorten
from modelzoo.adapter_files import Adapter, open_adapter, save_adapter

ADAPTER_FOLDER = "adapter"


def is_on(settings: LoraConfig) -> bool:
    """Whether the run trains updates instead of the weights."""
    return settings.r > 0 or settings.adapter is not None


def add_updates(settings: LoraConfig, model: Any, seed: int) -> Lora | None:
    """Freeze the routed `model` and give it the updates that the settings name, with their first values.

    None, and nothing done, when LoRA is off. Raises UserError.
    """
    if not is_on(settings):
        given = [key for key in ("match", "train_norms") if getattr(settings, key) != getattr(LoraConfig(), key)]
        if given:
            raise UserError(f"lora.{given[0]} was given, but lora.r=0 trains the weights themselves. Set lora.r too.")
        return None
    if settings.adapter is None:
        return add_lora(model, settings.r, settings.alpha, settings.match, train_norms=settings.train_norms, seed=seed)
    adapter = open_adapter(settings.adapter)
    _require_agreement(settings, adapter)
    return add_adapter(model, adapter, train_norms=settings.train_norms)


def add_adapter(model: Any, adapter: Adapter, *, train_norms: bool) -> Lora:
    """Freeze `model` and give it the updates of `adapter`. Raises UserError when they are not of this model."""
    if adapter.others and not train_norms:
        raise UserError(
            f"The adapter '{adapter.folder}' holds more than low-rank updates: {adapter.others[0]} "
            f"({len(adapter.others)} in all). Where these are norms, go on with lora.train_norms=true."
        )
    lora = add_lora(model, adapter.r, adapter.alpha, adapter.layers, train_norms=train_norms)
    load_lora(model, adapter.read())
    return lora


def spec_fields(lora: Lora | None) -> dict[str, Any]:
    """What of the updates is part of the step."""
    if lora is None:
        return {}
    layers = ", ".join(sorted(shorten(sorted(lora.layers))))
    return {"r": lora.r, "alpha": lora.alpha, "layers": layers, "train_norms": lora.train_norms}


def save_trained(model: Any, output: Path, tokenizer: Path | None, config: TrainConfig) -> None:
    """Write the run's model into `output`, and its updates into `output`/adapter. The model is the merged one then."""
    if is_on(config.lora):
        save_adapter(model, output / ADAPTER_FOLDER, config.checkpoint.model_name_or_path)
        print(f"Adapter saved at {output / ADAPTER_FOLDER}/")
        merge_lora(model)
        if not config.lora.merge:
            return
    modelzoo.save_model(model, output, tokenizer=tokenizer)
    print(f"Checkpoint saved at {output}/")


def _require_agreement(settings: LoraConfig, adapter: Adapter) -> None:
    """An adapter says its own rank, scale and layers: settings beside it must not say something else."""
    standard = LoraConfig()
    for key, given, own in (
        ("r", settings.r, adapter.r),
        ("alpha", settings.alpha, adapter.alpha),
        ("match", settings.match, None),
    ):
        if given != getattr(standard, key) and given != own:
            said = "names its own layers" if key == "match" else f"says {own}"
            raise UserError(f"lora.{key}={given} was given, and lora.adapter={adapter.folder} {said}. Leave it out.")
