"""What is compared: named variants of one model, all on the same weights.

A variant says how to make its model from the loaded one. Today it differs in the backends that compute its layers;
whatever else can compute the same model (another compiler, another device) is one more function that makes variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import modelzoo
from apps.parity.entries import Entry
from apps.parity.settings import CompareSettings
from apps.training.progress import Progress
from backends.errors import UserError
from backends.layers import BackendAttention, BackendLinear
from backends.routing import Plan, route
from modelzoo.build import finish, put_parameter


@dataclass(frozen=True)
class Variant:
    """One way to compute the model. `build` gives it, in evaluation mode, on the weights of the model it is given."""

    name: str
    routing: Plan
    build: Callable[[nn.Module], Any]


def read_config(settings: CompareSettings) -> Any:
    """The zoo config of the model to compare on. Raises UserError; reads no weight."""
    names, model = settings.checkpoint, settings.model
    return modelzoo.load_config(
        config_name=names.config_name,
        model_name_or_path=names.model_name_or_path,
        compute_dtype=model.compute_dtype,
        norm_dtype=model.norm_dtype,
        residual_dtype=model.residual_dtype,
        logits_dtype=model.logits_dtype,
        article_attention=model.article_attention,
        max_seq_length=model.max_seq_length,
    )


def plan_variants(entries: Sequence[Entry], model_config: Any, settings: CompareSettings) -> list[Variant]:
    """The variants, their rules and options checked on a model without weights. Raises UserError."""
    return [_of_backends(entry, model_config, settings) for entry in entries]


def load_model(settings: CompareSettings, model_config: Any, device: torch.device) -> Any:
    """The model whose weights all variants share: the checkpoint's, or random ones of the seed."""
    folder, dtype = settings.checkpoint.model_name_or_path, settings.model.dtype
    label, unit = ("Drawing weights", "numbers") if folder is None else (f"Loading {folder}", "bytes")
    with Progress(None, label, unit, mode=settings.progress) as progress:
        if folder is None:
            return modelzoo.build_model(
                model_config, device=device, dtype=dtype, seed=settings.seed, progress=progress.show
            )
        return modelzoo.load_model(folder, model_config, device=device, dtype=dtype, progress=progress.show)


def _of_backends(entry: Entry, model_config: Any, settings: CompareSettings) -> Variant:
    """The model with its layers routed by `entry`."""

    def routed(model: Any) -> Plan:
        return route(model, entry.rules, entry.default, sequence_length=settings.model.max_seq_length)

    def build(weights: nn.Module) -> Any:
        model = modelzoo.build_meta(model_config, dtype=settings.model.dtype)
        for name, parameter in weights.named_parameters():
            put_parameter(model, name, parameter)  # the same memory
        finish(model)
        routed(model)
        return model.eval()

    bare = modelzoo.build_meta(model_config, dtype=settings.model.dtype)
    routing = routed(bare)
    if settings.calibrate_batches == 0:
        _refuse_uncalibrated(bare, entry.name)
    return Variant(entry.name, routing, build)


def _refuse_uncalibrated(model: nn.Module, variant: str) -> None:
    """A state that starts infinite is a range nobody has seen yet: without calibration there is nothing to measure."""
    for name, layer in model.named_modules():
        if isinstance(layer, BackendLinear | BackendAttention):
            for state, spec in layer.state_specs.items():
                if math.isinf(spec.fill):
                    raise UserError(
                        f"calibrate_batches=0 leaves '{state}' of layer '{name}' of {variant} without a value. "
                        "Expected at least 1."
                    )
