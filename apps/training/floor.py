"""The floor: what a train step of this size takes at the least, with nothing in it but what nobody can leave out.

Every product of the model's linear layers (forward, gradient of the input, gradient of the weight) at its real shape,
causal attention forward and backward, and the optimizer's numbers read and written once; each measured alone on the
device, by PyTorch's fastest kernel. Layers that read the same input count as one product. How a backend or a region
computes any of it changes nothing here: recomputed activations, wider sums and elementwise work are no part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from apps.training.floor_timing import Stopwatch, Times
from apps.training.parameter_groups import state_elements
from apps.training.step_plan import StepPlan
from backends.joint import layers_of_one_input
from backends.layers import BackendAttention, BackendLinear
from backends.precision import BITS, as_torch


class Clock(Protocol):
    """Seconds of a piece of work measured alone, see `Stopwatch`."""

    def product(self, tokens: int, width_in: int, width_out: int) -> Times: ...
    def attention(self, batch: int, heads: int, key_heads: int, length: int, head_dim: int) -> Times: ...
    @property
    def copy_bytes_per_second(self) -> float: ...


@dataclass(frozen=True)
class Floor:
    """Seconds: `forward` and `backward` of each block, `head` with its backward, a `teacher`'s forward, the `update`.

    `product_flops_per_second`: of all the step's products together. `device`: its name, or CPU.
    """

    device: str
    forward: list[float]
    backward: list[float]
    head: float
    teacher: float
    update: float
    product_flops_per_second: float
    copy_bytes_per_second: float

    @property
    def microbatch(self) -> float:
        """Seconds of forward and backward of one microbatch."""
        return sum(self.forward) + sum(self.backward) + self.head + self.teacher

    def to_json(self) -> dict[str, Any]:
        """What an artifact's manifest keeps of it."""
        return {"device": self.device, "microbatch_seconds": self.microbatch, "update_seconds": self.update}


@dataclass(frozen=True)
class Product:
    """y [tokens, width_out] = x [tokens, width_in] Wᵀ; `trained`: W has a gradient."""

    width_in: int
    width_out: int
    trained: bool


def measure_floor(plan: StepPlan, device: torch.device) -> Floor | None:
    """Measure the floor of the planned step on `device`; None where its memory does not hold the largest product."""
    try:
        return floor_of(plan, Stopwatch(device, as_torch(plan.precision.compute)), device_name(device))
    except torch.OutOfMemoryError:
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or CPU: where a floor was measured."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def floor_of(plan: StepPlan, clock: Clock, device: str) -> Floor:
    """The floor by what `clock` says of each piece of work."""
    batch, length, config = plan.spec.batch_size, plan.spec.max_seq_length, plan.model_config
    blocks, head = _parts(plan.model)
    forward, backward = [], []
    flops = seconds = 0.0
    for part in (*blocks, head):
        there = back = 0.0
        for product in products_of(part):
            times = clock.product(batch * length, product.width_in, product.width_out)
            runs = 2 + product.trained
            there += times.forward
            back += times.backward - (0.0 if product.trained else times.of_weight)
            flops += runs * 2.0 * batch * length * product.width_in * product.width_out
        seconds += there + back
        for attention in _attentions(part):
            times = clock.attention(batch, attention.num_heads, config.num_key_value_heads, length, attention.head_dim)
            there, back = there + times.forward, back + times.backward
        forward.append(there)
        backward.append(back)
    copied = clock.copy_bytes_per_second
    head_seconds = forward.pop() + backward.pop()
    taught = _teacher_seconds(plan, clock)
    update = update_bytes(plan) / copied
    return Floor(device, forward, backward, head_seconds, taught, update, flops / seconds, copied)


def products_of(part: nn.Module) -> Iterator[Product]:
    """The products of the linear layers in a part of a model; those that share their input are one."""
    # what a backend allows, or a layer stores, is not asked: a dense step would join them
    joint = {id(layer): id(module) for module in part.modules() for layer in layers_of_one_input(module)}
    joined: dict[Any, list[BackendLinear]] = {}
    for layer in part.modules():
        if isinstance(layer, BackendLinear):
            alone = layer.stored is not None or id(layer) not in joint
            key = id(layer) if alone else (joint[id(layer)], _trained(layer.weight))
            joined.setdefault(key, []).append(layer)
    for layers in joined.values():
        first = layers[0]
        if first.stored is not None:
            matrices = [getattr(first, name) for name in first.stored if getattr(first, name).ndim == 2]
            yield from (_product(matrix) for matrix in matrices)
            continue
        yield Product(first.in_features, sum(layer.out_features for layer in layers), _trained(first.weight))
        for layer in layers:
            if layer.lora_alpha is not None:
                yield _product(layer.lora_A)
                yield _product(layer.lora_B)


def update_bytes(plan: StepPlan) -> int:
    """What an update reads and writes at the least: gradients, weights, masters and the optimizer's state."""
    precision = plan.precision
    width = BITS[precision.parameters] // 8
    masters = 2 * precision.master_bits // 8
    # of a weight with a whole master nobody reads the narrow copy
    each = width + (width if masters and precision.rounding != "split" else 2 * width) + masters
    return plan.num_trained * each + 2 * state_elements(plan.groups) * BITS[precision.moments] // 8


def _teacher_seconds(plan: StepPlan, clock: Clock) -> float:
    teacher = plan.bare_teacher()
    if teacher is None:
        return 0.0
    batch, length, config = plan.spec.batch_size, plan.spec.max_seq_length, plan.teacher_config
    blocks, head = _parts(teacher)
    seconds = 0.0
    for part in (*blocks, head):
        for product in products_of(part):
            seconds += clock.product(batch * length, product.width_in, product.width_out).forward
        for attention in _attentions(part):
            heads, keys = attention.num_heads, config.num_key_value_heads  # type: ignore[union-attr]
            seconds += clock.attention(batch, heads, keys, length, attention.head_dim).forward
    return seconds


def _parts(model: Any) -> tuple[list[nn.Module], nn.Module]:
    names = model.stages()
    return [model.get_submodule(path) for path in names.blocks], model.get_submodule(names.head)


def _attentions(part: nn.Module) -> list[BackendAttention]:
    return [module for module in part.modules() if isinstance(module, BackendAttention)]


def _product(matrix: Any) -> Product:
    width_out, width_in = matrix.shape
    return Product(width_in, width_out, _trained(matrix))


def _trained(parameter: Any) -> bool:
    return bool(parameter.requires_grad)
