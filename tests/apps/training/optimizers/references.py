"""Independent implementations to compare optimizers with: torch.optim, optax, or the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A rule of one parameter with its numbers: (gradient, rate) → the parameter after the step.
Reference = Callable[[Tensor, float], Tensor]


def torchs(make: Callable[..., torch.optim.Optimizer], **settings: Any) -> Callable[[Tensor], Reference]:
    """A class of torch.optim as a rule."""

    def start(parameter: Tensor) -> Reference:
        theirs = parameter.detach().clone().requires_grad_()
        optimizer = make([theirs], lr=1.0, **settings)

        def step(gradient: Tensor, rate: float) -> Tensor:
            theirs.grad = gradient.clone()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            return theirs.detach()

        return step

    return start


def optaxs(make: Callable[..., Any], **settings: Any) -> Callable[[Tensor], Reference]:
    """A transformation of optax as a rule; `make(learning_rate, **settings)` is made anew for each rate."""

    def start(parameter: Tensor) -> Reference:
        import jax
        import optax

        jax.config.update("jax_enable_x64", True)
        held: dict[str, Any] = {"value": jax.numpy.asarray(parameter.detach().numpy())}
        held["state"] = make(1.0, **settings).init(held["value"])

        def step(gradient: Tensor, rate: float) -> Tensor:
            given = jax.numpy.asarray(gradient.numpy())
            change, held["state"] = make(rate, **settings).update(given, held["state"], held["value"])
            held["value"] = optax.apply_updates(held["value"], change)
            return torch.tensor(held["value"].tolist(), dtype=torch.float64)

        return step

    return start


def decoupled(inner: Callable[[Tensor], Reference], decay: float) -> Callable[[Tensor], Reference]:
    """A rule without decay, given decoupled decay: p ← (1 − lr·λ)·p + (its own change from there)."""

    def start(parameter: Tensor) -> Reference:
        step, held = (
            inner(torch.zeros_like(parameter)),
            {"value": parameter.clone(), "sum": torch.zeros_like(parameter)},
        )

        def both(gradient: Tensor, rate: float) -> Tensor:
            total = step(gradient, rate).clone()
            held["value"] = held["value"] * (1 - rate * decay) + (total - held["sum"])
            held["sum"] = total
            return held["value"]

        return both

    return start


def normalized(momentum: float, nesterov: bool, decay: float) -> Callable[[Tensor], Reference]:
    """Normalized SGD with momentum written out: no library has it."""

    def start(parameter: Tensor) -> Reference:
        value, total = parameter.clone(), torch.zeros_like(parameter)

        def step(gradient: Tensor, rate: float) -> Tensor:
            nonlocal value, total
            total = momentum * total + gradient
            ahead = momentum * total + gradient if nesterov else total
            value = value - rate * (decay * value + ahead / torch.linalg.vector_norm(ahead))
            return value

        return step

    return start
