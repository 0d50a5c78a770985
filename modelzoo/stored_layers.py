"""Layers that hold other parameters than a weight, as a checkpoint's config.json tells of them.

`stored_layers` there: layer → {use: BACKEND, option: value, …}, as in a rule. The weights file then has the backend's
names (`….q_proj.weight_in`) in place of `….q_proj.weight`. transformers alone cannot read such a checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from backends import load
from backends.errors import UserError
from backends.layers import BackendLinear

FIELD = "stored_layers"


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What `config.json` says of a model's layers; empty for a model of weights only."""
    return {
        name: {"use": layer.backend.name} | _changed_options(layer)
        for name, layer in model.named_modules()
        if isinstance(layer, BackendLinear) and layer.stored is not None
    }


def restore(model: nn.Module, config: Any) -> None:
    """Give the layers of `model` (on any device) the parameters that its config tells of, without values yet."""
    told = getattr(config, FIELD, None) or {}
    layers = dict(model.named_modules())
    for name, rule in told.items():
        layer = layers.get(name)
        if (
            not isinstance(layer, BackendLinear)
            or not isinstance(rule, Mapping)
            or not isinstance(rule.get("use"), str)
        ):
            raise UserError(
                f"config.json has {FIELD} for '{name}', which is no linear layer of the model, or names no backend. "
                "Use the config.json that belongs to the weights."
            )
        layer.set_backend(load(rule["use"], **{key: value for key, value in rule.items() if key != "use"}))


def _changed_options(layer: BackendLinear) -> dict[str, Any]:
    defaults = {field.name: field.default for field in dataclasses.fields(layer.backend.config)}
    options = layer.backend.options()
    return {name: value for name, value in options.items() if value != defaults[name]}
