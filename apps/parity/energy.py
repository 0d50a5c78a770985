"""What the products of a forward cost in energy, by the models that the backends state (`Backend.cost`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from backends.base import Backend, Cost
from backends.layers import BackendAttention
from backends.routing import Plan


@dataclass(frozen=True)
class Energy:
    """Joules for one token of a forward, and the share of the routed layers' FLOPs whose backend states an energy.

    `joules` is None when none does. Layers without a model (dense ones) are not in the sum: the share says how much is.
    """

    joules: float | None
    share: float


def energy_per_token(model: nn.Module, routing: Plan, *, batch_size: int, length: int, itemsize: int) -> Energy:
    """Sum over every routed product, for batches of `batch_size` rows of `length` tokens of `itemsize` bytes each.

    Causal attention meets half of the keys on average, as in the table of what was routed.
    """
    joules = flops = stated = 0.0
    tokens = batch_size * length
    for one in routing.routes:
        for name in one.layers:
            for count, cost in _products(model.get_submodule(name), one.backend, batch_size, length, itemsize):
                flops += count * cost.flops
                if cost.joules is not None:
                    stated += count * cost.flops
                    joules += count * cost.joules
    return Energy(joules / tokens if stated else None, stated / flops if flops else 0.0)


def energy_constants(routing: Plan) -> list[tuple[str, str, str]]:
    """Name, value and source of every constant that the backends' energies stand on, each once."""
    return list(dict.fromkeys(row for one in routing.routes for row in one.backend.cost_constants()))


def _products(
    layer: nn.Module, backend: Backend, batch_size: int, length: int, itemsize: int
) -> list[tuple[int, Cost]]:
    """(how many, cost of one) of the products of a layer's forward."""
    if isinstance(layer, BackendAttention):
        keys, count = max(length // 2, 1), batch_size * layer.num_heads
        scores = backend.cost(length, layer.head_dim, keys, itemsize=itemsize)
        values = backend.cost(length, keys, layer.head_dim, itemsize=itemsize)
        return [(count, scores), (count, values)]
    assert isinstance(layer, nn.Linear)
    return [(1, backend.cost(batch_size * length, layer.in_features, layer.out_features, itemsize=itemsize))]
