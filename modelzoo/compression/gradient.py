"""Feature mimicking by gradient: each layer's factors learn to give what the dense layer gives, beside the model.

The model runs forward, unchanged; a hook on each chosen layer hands its input and output to the layer's twin, which
takes a step of AdamW on their mean squared difference (Yu & Wu, AAAI 2023, without their closed form).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UserError
from modelzoo.compression.methods import Factors
from modelzoo.compression.streaming import Batch

EPSILON, BETAS, DECAY = 1e-8, (0.9, 0.999), 0.01  # PyTorch's AdamW
NAMES = ("weight_in", "weight_out", "bias")


@dataclass
class Twin:
    """The factors of one layer as they learn, in at least float32, and the best of them so far."""

    tensors: dict[str, Tensor]
    first: dict[str, Tensor] = field(default_factory=dict)
    second: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    since: list[Tensor] = field(default_factory=list)  # losses of the window, on the device
    losses: list[float] = field(default_factory=list)  # means of the windows
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = float("inf")

    def __post_init__(self) -> None:
        self.first = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in self.tensors.items()}

    def close_window(self) -> None:
        """Judge the factors by the mean loss since the last time: one batch alone would favour an easy one."""
        if not self.since:
            return
        loss = float(torch.stack(self.since).mean())
        self.since.clear()
        self.losses.append(loss)
        if loss < self.best_loss:
            self.best_loss, self.best = loss, {name: tensor.clone() for name, tensor in self.tensors.items()}


def loss_and_gradients(tensors: Mapping[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of (ŷ − y)² over all elements of y [tokens, out], and its gradients; x [tokens, in]."""
    inner = x @ tensors["weight_in"].t()
    error = torch.addmm(tensors["bias"], inner, tensors["weight_out"].t()) - y
    scaled = error * (2.0 / error.numel())
    gradients = {
        "weight_in": (scaled @ tensors["weight_out"]).t() @ x,
        "weight_out": scaled.t() @ inner,
        "bias": scaled.sum(0),
    }
    return error.square().mean(), gradients


def adamw_step(
    tensors: dict[str, Tensor],
    first: dict[str, Tensor],
    second: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    numbers: Tensor,
) -> Tensor:
    """One step in place on one batch; returns the loss before it. `numbers`: lr, clip, 1 − β1ᵗ, 1 − β2ᵗ."""
    loss, gradients = loss_and_gradients(tensors, x, y)
    lr, clip, correction1, correction2 = numbers.unbind()
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    scale = (clip / (norm + 1e-6)).clamp_max(1.0)
    for name, tensor in tensors.items():
        gradient = gradients[name] * scale
        first[name].lerp_(gradient, 1 - BETAS[0])
        second[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        change = (first[name] / correction1) / ((second[name] / correction2).sqrt() + EPSILON)
        tensor.mul_(1 - lr * DECAY).sub_(lr * change)
    return loss


@functools.cache
def _compiled_step() -> Callable[..., Tensor]:
    """The step, compiled once for each distinct shape of a layer."""
    return torch.compile(adamw_step, dynamic=False)


@torch.no_grad()
def learn_factors(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    start: Mapping[str, Factors],
    batches: Iterable[Batch],
    *,
    lr: float = 8.6e-5,
    clip: float = 2.0,
    window: int = 8,
    compiled: bool = True,
    on_window: Callable[[int, dict[str, float]], None] = lambda batch, losses: None,
) -> tuple[dict[str, Factors], dict[str, list[float]]]:
    """Factors of `layers` (by name, in `model`) after a step on each of `batches`, and each window's mean losses.

    `start`: factors to begin with, usually those of the SVD. The model is not changed. Losses are means over the
    elements of y; the best window's last factors are kept. `on_window(batch, losses)` is called after each `window`
    batches. UserError naming a layer whose loss is not finite.
    """
    twins = {name: _twin(layers[name], start[name]) for name in layers}
    step = _compiled_step() if compiled else adamw_step

    def hook(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        twin = twins[name]
        dtype = twin.tensors["weight_in"].dtype
        x, y = (tensor.reshape(-1, tensor.shape[-1]).to(dtype) for tensor in (inputs[0], output))
        twin.step += 1
        corrections = [1 - beta**twin.step for beta in BETAS]
        numbers = torch.tensor([lr, clip, *corrections], dtype=dtype, device=x.device)
        twin.since.append(step(twin.tensors, twin.first, twin.second, x, y, numbers))

    handles = [layer.register_forward_hook(functools.partial(hook, name)) for name, layer in layers.items()]
    try:
        for number, batch in enumerate(batches, start=1):
            model(**batch)
            if number % window == 0:
                _close(twins)
                on_window(number, {name: twin.losses[-1] for name, twin in twins.items()})
        _close(twins)
    finally:
        for handle in handles:
            handle.remove()
    found = {name: _factors(twin, start[name]) for name, twin in twins.items()}
    return found, {name: twin.losses for name, twin in twins.items()}


def _twin(layer: nn.Linear, start: Factors) -> Twin:
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    device = layer.weight.device
    bias = start.bias if start.bias is not None else start.weight_out.new_zeros(len(start.weight_out))
    values = (start.weight_in, start.weight_out, bias)
    tensors = {name: value.to(device, dtype, copy=True) for name, value in zip(NAMES, values, strict=True)}
    return Twin(tensors)


def _close(twins: Mapping[str, Twin]) -> None:
    for name, twin in twins.items():
        twin.close_window()
        if twin.losses and not torch.isfinite(torch.tensor(twin.losses[-1])):
            raise UserError(f"The loss of layer '{name}' is not finite. Lower compress.lr, or use method=mimic.")


def _factors(twin: Twin, start: Factors) -> Factors:
    best = {name: tensor.to(torch.float64) for name, tensor in (twin.best or twin.tensors).items()}
    return Factors(best["weight_in"], best["weight_out"], best["bias"], start.spectrum)
