"""Independent implementations to compare optimizers with: torch.optim, optax, or the formula in float64."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
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


def optaxs(name: str, *, l2: float = 0.0, **settings: Any) -> Callable[[Tensor], Reference]:
    """optax's transformation `name` as a rule; `l2` times the parameter is added to the gradient before it."""

    def start(parameter: Tensor) -> Reference:
        pipe, number = _server(), next(_numbers)
        pipe.send((number, name, l2, settings, parameter.detach().numpy()))

        def step(gradient: Tensor, rate: float) -> Tensor:
            pipe.send((number, rate, gradient.numpy()))
            return torch.from_numpy(pipe.recv())

        return step

    return start


_numbers = itertools.count()


@functools.cache
def _server() -> Any:
    """A process for optax: JAX warns of every later fork in the process it has run in, and a warning fails a test."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs,), daemon=True).start()
    return ours


def _serve(pipe: Any) -> None:
    import jax
    import numpy as np
    import optax

    jax.config.update("jax_enable_x64", True)
    held: dict[int, list[Any]] = {}
    while True:
        number, *message = pipe.recv()
        if number not in held:
            name, l2, settings, value = message

            def make(rate: float, name: str = name, l2: float = l2, settings: Any = settings) -> Any:
                inner = getattr(optax, name)(rate, **settings)
                return optax.chain(optax.add_decayed_weights(l2), inner) if l2 else inner

            held[number] = [make, jax.numpy.asarray(value), make(1.0).init(jax.numpy.asarray(value))]
            continue
        rate, gradient = message
        make, value, state = held[number]
        change, state = make(rate).update(jax.numpy.asarray(gradient), state, value)
        value = optax.apply_updates(value, change)
        held[number] = [make, value, state]
        pipe.send(np.array(value))


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
