"""What the contract is tested on: the backends, and operands for their functions."""

import os

import torch
from torch import Tensor

import backends
from backends.base import Backend, StateSpec

# A backend from outside is tested as docs/own-backend.md says: SUBSTRATE_BACKENDS=package.module:Class
OUTSIDE = os.environ.get("SUBSTRATE_BACKENDS", "").split()
NAMES = OUTSIDE or [*backends.available(), "tests.backends.stateful_backend:ScaledBackend"]
IN, OUT, HEADS, GROUPS, HEAD_DIM, LENGTH = 6, 10, 4, 2, 8, 5


def tensors(specs: dict[str, StateSpec]) -> dict[str, Tensor]:
    return {name: torch.full(spec.shape, spec.fill, dtype=getattr(torch, spec.dtype)) for name, spec in specs.items()}


def linear_operands(backend: Backend, dtype: torch.dtype, bias: bool = True) -> tuple[Tensor, object, Tensor | None]:
    """x, and weight and bias as `backend.linear` gets them from a layer."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, IN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(OUT, IN, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(OUT, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    if backend.parameter_spec(IN, OUT, bias) is not None:
        return x, backend.initial_parameters(weight, b), None
    return x, weight, b


def attention_operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = ((2, HEADS, LENGTH, HEAD_DIM), (2, GROUPS, LENGTH, HEAD_DIM), (2, GROUPS, LENGTH, HEAD_DIM))
    q, k, v = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def attend(backend: Backend, q: Tensor, k: Tensor, v: Tensor, state: dict, *, mask=None, training=False):
    return backend.attention(q, k, v, mask=mask, scale=HEAD_DIM**-0.5, is_causal=True, state=state, training=training)


def calibrated(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """The state after one training forward: what is given stays, what the backend returns is new."""
    state = tensors(backend.attention_state(HEADS, HEAD_DIM))
    return state | attend(backend, q, k, v, state, training=True)[1]


def returned(specs: dict[str, StateSpec]) -> set[str]:
    """Names of the state that a backend hands back; the rest is given to it."""
    return {name for name, spec in specs.items() if spec.given is None}
