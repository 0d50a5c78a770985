"""Feature mimicking by gradient: each layer's factors learn to give what the dense layer gives, beside the model.

The model runs forward, unchanged; a hook on each chosen layer hands its input and output to the layer's twin, which
takes a step of AdamW on their mean squared difference (Yu & Wu, AAAI 2023, without their closed form).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backends.errors import UserError
from modelzoo.compression.block_calls import Batch
from modelzoo.compression.methods import Factors

NAMES = ("weight_in", "weight_out", "bias")


class Twin:
    """The factors of one layer as they learn, in at least float32, and the best of them so far."""

    def __init__(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        self.tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        self.optimizer = torch.optim.AdamW(list(self.tensors.values()), lr=lr)
        self.since: list[Tensor] = []  # losses of the window, on the device
        self.losses: list[float] = []  # means of the windows
        self.best: dict[str, Tensor] = {}
        self.best_loss = float("inf")

    def step(self, loss: Tensor, gradients: Mapping[str, Tensor], clip: float) -> None:
        """One step of AdamW along `gradients`, which belong to `loss`."""
        self.since.append(loss)
        for name, tensor in self.tensors.items():
            tensor.grad = gradients[name]
        nn.utils.clip_grad_norm_(list(self.tensors.values()), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close_window(self) -> None:
        """Judge the factors by the mean loss since the last time: one batch alone would favour an easy one."""
        if not self.since:
            return
        loss = float(torch.stack(self.since).mean())
        self.since.clear()
        self.losses.append(loss)
        if loss < self.best_loss:
            self.best_loss, self.best = loss, {name: tensor.detach().clone() for name, tensor in self.tensors.items()}


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


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """`loss_and_gradients`, compiled once for each distinct shape of a layer."""
    return torch.compile(loss_and_gradients, dynamic=False)


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
    twins = {name: _twin(layers[name], start[name], lr) for name in layers}
    compute = _compiled() if compiled else loss_and_gradients

    def hook(name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        twin = twins[name]
        dtype = twin.tensors["weight_in"].dtype
        x, y = (tensor.reshape(-1, tensor.shape[-1]).to(dtype) for tensor in (inputs[0], output))
        twin.step(*compute(twin.tensors, x, y), clip)

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


def _twin(layer: nn.Linear, start: Factors, lr: float) -> Twin:
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    device = layer.weight.device
    bias = start.bias if start.bias is not None else start.weight_out.new_zeros(len(start.weight_out))
    values = (start.weight_in, start.weight_out, bias)
    tensors = {name: value.to(device, dtype, copy=True) for name, value in zip(NAMES, values, strict=True)}
    return Twin(tensors, lr)


def _close(twins: Mapping[str, Twin]) -> None:
    for name, twin in twins.items():
        twin.close_window()
        if twin.losses and not torch.isfinite(torch.tensor(twin.losses[-1])):
            raise UserError(f"The loss of layer '{name}' is not finite. Lower compress.lr, or use method=mimic.")


def _factors(twin: Twin, start: Factors) -> Factors:
    best = {name: tensor.detach().to(torch.float64) for name, tensor in (twin.best or twin.tensors).items()}
    return Factors(best["weight_in"], best["weight_out"], best["bias"], start.spectrum)
