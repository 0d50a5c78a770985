"""Backends whose error is known beforehand, and a model to put them in; for tests only."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F

from apps.parity.settings import CheckpointSettings, CompareSettings
from apps.training.config_schema import ModelConfig
from backends.base import Backend, Cost, StateSpec
from backends.dense import Dense
from backends.routing import route
from modelzoo import build_model
from modelzoo.configuration_transformer import ConfigurationTransformer
from tests.modelzoo.llamas import llama_config

LOUDER, BLUNT, STORING, UNSEEN = (f"{__name__}:{name}" for name in ("Louder", "Blunt", "Storing", "Unseen"))
JOULES_PER_MAC = 2e-15


class Louder(Backend):
    """1 + `error` times the exact products, and so are their gradients: every relative error is `error`."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        error: float = 0.01

    def linear(self, x, weight, bias, state, *, training=False):
        return (1 + self.config.error) * F.linear(x, weight, bias), state

    def attention(self, q, k, v, *, mask, scale, is_causal, state, training=False):
        out, state = Dense().attention(
            q, k, v, mask=mask, scale=scale, is_causal=is_causal, state=state, training=training
        )
        return (1 + self.config.error) * out, state

    def cost(self, m, k, n, *, itemsize=4):
        return Cost(flops=2.0 * m * k * n, bytes=0.0, joules=JOULES_PER_MAC * m * k * n)

    def cost_constants(self):
        return [("mac", f"{JOULES_PER_MAC:g} J", "assumption: made up")]


class Blunt(Backend):
    """The exact product of linears without any gradient."""

    def linear(self, x, weight, bias, state, *, training=False):
        return F.linear(x, weight, bias).detach(), state


class Storing(Backend):
    """The exact product of linears from a matrix stored under a name of its own."""

    def linear(self, x, weight, bias, state, *, training=False):
        return F.linear(x, weight["matrix"]), state

    def parameter_spec(self, in_features, out_features, bias):
        return {"matrix": (out_features, in_features)}

    def initial_parameters(self, weight, bias):
        return {"matrix": weight.clone()}


class Unseen(Backend):
    """The exact product of linears, clamped to the largest magnitude that training has seen."""

    def linear(self, x, weight, bias, state, *, training=False):
        y, largest = F.linear(x, weight, bias), state["largest"]
        if training:
            seen = y.detach().abs().amax().to(largest.dtype)
            return y, {"largest": torch.where(largest.isinf(), seen, torch.maximum(largest, seen))}
        return torch.clamp(y, -largest.to(y.dtype), largest.to(y.dtype)), state

    def linear_state(self, in_features, out_features):
        return {"largest": StateSpec((), fill=math.inf, reduce="max")}


def pair(*rules, **changes):
    """Two models in evaluation mode on the same weights, the second routed by `rules`; float64 but for what changes."""
    config = ConfigurationTransformer().transform(llama_config(**changes))
    reference, other = (build_model(config, dtype="float64").eval() for _ in range(2))
    route(other, rules)
    return reference, other


def settings_for(dataset, model, *backends, **changes):
    """Settings of a comparison on tests/apps' tiny dataset and model; three rows a batch leave the last one padded."""
    return CompareSettings(
        backends=[*backends] or ["dense", "dense"],
        checkpoint=CheckpointSettings(config_name=str(model)),
        model=ModelConfig(max_seq_length=32),
        dataset=str(dataset),
        **{"batch_size": 3, "calibrate_batches": 2, "num_batches": 2, "timing_rounds": 1, **changes},
    )


def batch(vocabulary=61, rows=2, length=8):
    """Random tokens, every position but the last counted."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.float64)
    mask[:, -1] = 0
    return {"input_ids": ids, "labels": ids.roll(-1, 1), "grad_scale": mask / mask.sum()}
