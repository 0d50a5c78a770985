"""Fifty steps of every optimizer in float64 against an implementation of others, a matrix and a vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training import optimizers
from apps.training.optimizers import Optimizer
from tests.apps.training.optimizers.references import Reference, decoupled, normalized, optaxs, torchs

SHAPES = [(7, 5), (6,)]
# torch's root mean square of a gradient is not corrected for its start, optax's is if told to
RMS = {"decay": 0.99, "eps": 1e-8, "eps_in_sqrt": False, "bias_correction": True}
ADAM = {"b1": 0.9, "b2": 0.98, "eps": 1e-7}
# name → settings, and the same in another's words for a given decay
CASES: dict[str, tuple[str, dict[str, Any], Callable[[float], Callable[[Tensor], Reference]]]] = {
    "adam": (
        "adam",
        {"beta1": 0.85, "beta2": 0.98, "eps": 1e-7},
        lambda decay: torchs(torch.optim.Adam, betas=(0.85, 0.98), eps=1e-7, weight_decay=decay),
    ),
    "adamw": (
        "adamw",
        {"beta1": 0.85, "beta2": 0.98, "eps": 1e-7},
        lambda decay: torchs(torch.optim.AdamW, betas=(0.85, 0.98), eps=1e-7, weight_decay=decay),
    ),
    "adamw nesterov": (
        "adamw",
        {"beta1": 0.9, "beta2": 0.98, "eps": 1e-7, "nesterov": True},
        lambda decay: optaxs("nadamw", **ADAM, weight_decay=decay),
    ),
    "nadam": (
        "nadam",
        {"beta1": 0.9, "beta2": 0.98, "eps": 1e-7},
        lambda decay: optaxs("nadam", l2=decay, **ADAM),
    ),
    "rmsprop": ("rmsprop", {"decay": 0.99}, lambda decay: decoupled(optaxs("rmsprop", **RMS), decay)),
    "sgdm": ("sgdm", {"momentum": 0.9}, lambda decay: decoupled(torchs(torch.optim.SGD, momentum=0.9), decay)),
    "sgdm nesterov": (
        "sgdm",
        {"momentum": 0.8, "nesterov": True},
        lambda decay: decoupled(torchs(torch.optim.SGD, momentum=0.8, nesterov=True), decay),
    ),
    "normalized_sgdm": ("normalized_sgdm", {}, lambda decay: normalized(0.95, True, decay)),
    "normalized_sgdm without nesterov": (
        "normalized_sgdm",
        {"momentum": 0.7, "nesterov": False},
        lambda decay: normalized(0.7, False, decay),
    ),
    "lion": (
        "lion",
        {"beta1": 0.8, "beta2": 0.9},
        lambda decay: optaxs("lion", b1=0.8, b2=0.9, weight_decay=decay),
    ),
    "adafactor": (
        "adafactor",
        {"eps1": 1e-6, "eps2": 1e-2},
        lambda decay: torchs(torch.optim.Adafactor, eps=(1e-6, 1e-2), d=1.0, weight_decay=decay),
    ),
}


def run(rule: Optimizer, config: Any, step: int, rate: float, decayed: bool, held: dict[str, Any], g: Tensor) -> Tensor:
    """One step of the project's rule; `held` has the parameter and its state."""
    numbers = rule.hyperparameters(config, step, rate, decayed)
    hyper = {name: torch.tensor(numbers[name], dtype=torch.float64) for name in rule.hyperparameter_names}
    (updated,) = rule.update_group({"p": held["p"]}, {"p": g}, {"p": held["state"]}, {"p": hyper}).values()
    held["p"], held["state"] = updated
    return held["p"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=["matrix", "vector"])
@pytest.mark.parametrize("decayed", [True, False], ids=["decayed", "spared"])
def test_fifty_steps_equal_anothers(case: str, shape: tuple[int, ...], decayed: bool) -> None:
    name, settings, reference = CASES[case]
    chosen = optimizers.load(name)
    config = chosen.Config(lr=3e-2, weight_decay=0.3, **settings)
    rule = chosen(**{key: getattr(config, key) for key in chosen.structure})
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    theirs = reference(0.3 if decayed else 0.0)(start)
    state = {key: torch.zeros(extents, dtype=start.dtype) for key, extents in rule.state_shapes(shape).items()}
    held = {"p": start, "state": state}
    for step in range(1, 51):
        rate = config.lr / step**0.5  # a rate that moves: it must reach the update as given, not as config.lr
        gradient = torch.randn(shape, generator=generator, dtype=start.dtype) * 10 ** (step % 5 - 3)
        mine = run(rule, config, step, rate, decayed, held, gradient)
        assert (mine - theirs(gradient, rate)).abs().max() <= 1e-10, step
    assert (mine - start).abs().max() > 1e-3


def test_every_optimizer_of_elements_is_compared() -> None:
    """Those that work on matrices as such have tests of their own."""
    assert {name for name, _, _ in CASES.values()} >= set(optimizers.available()) - {"muon", "mango"}


@pytest.mark.parametrize("name", sorted({name for name, _, _ in CASES.values()}))
def test_a_gradient_of_zeros_moves_nothing_but_by_decay(name: str) -> None:
    chosen = optimizers.load(name)
    rule, config = chosen(), chosen.Config(weight_decay=0.0)
    for shape in SHAPES:
        zeros = {key: torch.zeros(extents, dtype=torch.float64) for key, extents in rule.state_shapes(shape).items()}
        held = {"p": torch.ones(shape, dtype=torch.float64), "state": zeros}
        moved = run(rule, config, 1, config.lr, True, held, torch.zeros(shape, dtype=torch.float64))
        assert torch.equal(moved, torch.ones(shape, dtype=torch.float64))
