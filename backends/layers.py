"""Layers that ask a backend for their products. Made of them, a model changes its substrate, not its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from backends import load
from backends.articles import mask_of_spans
from backends.base import Backend
from backends.errors import UserError
from backends.kernels.external import computed_by
from backends.state import Stateful, device_of


@cache
def default_backend() -> Backend:
    """The one `dense` that all layers share until a rule says otherwise."""
    return load("dense")


class BackendLinear(Stateful, nn.Linear):
    """nn.Linear whose product a backend computes, in `compute_dtype` (None: the dtypes given)."""

    backend: Backend
    compute_dtype: torch.dtype | None = None
    # Shapes of what the layer stores instead of weight and bias, which are then None.
    stored: Mapping[str, tuple[int, ...]] | None = None
    # α of a low-rank update (backends/lora.py); the layer then has lora_A [r, in] and lora_B [out, r] too.
    lora_alpha: float | None = None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_backend(default_backend())

    @classmethod
    def adopt(cls, linear: nn.Linear) -> BackendLinear:
        """Turn a plain nn.Linear into one of these in place: the same object, with its weights, name and hooks."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.set_backend(default_backend())
        return linear

    def set_backend(self, backend: Backend, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Compute with `backend` from now on. Its state starts afresh; weights change only if it stores other ones.

        `parameters`: what it is to store, instead of what it would make of the weight.
        """
        shapes = shapes_stored(self, backend)
        if self.stored is None and shapes is not None:
            self._store(backend, shapes, parameters)
        self.backend = backend
        self.set_state(backend.linear_state(self.in_features, self.out_features), device_of(self))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] → y [..., out_features]."""
        x, backend = cast(x, self.compute_dtype), computed_by(self.backend)
        weight: Any
        if self.stored is None:
            weight = self.effective_weight()
            bias = None if self.bias is None else cast(self.bias, self.compute_dtype)
        else:
            weight, bias = {name: cast(getattr(self, name), self.compute_dtype) for name in self.stored}, None
        y = self.call_with_state(lambda state: backend.linear(x, weight, bias, state, training=self.training))
        return _of_shape(y, (*x.shape[:-1], self.out_features), backend, "linear")

    def effective_weight(self) -> Tensor:
        """W, or W + α/r · B A with the sum made in at least float32: one matrix [out, in] in the compute dtype."""
        if self.lora_alpha is None:
            return cast(self.weight, self.compute_dtype)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.lora_B.to(wide) @ self.lora_A.to(wide)
        scale = self.lora_alpha / self.lora_A.shape[0]
        return (self.weight.to(wide) + scale * update).to(self.compute_dtype or self.weight.dtype)

    def hold_weight(self, weight: Tensor) -> None:
        """Store a plain weight [out, in] again, computed by `dense`, in place of what a backend had; a bias stays."""
        assert self.stored is not None
        trained = next(self.parameters()).requires_grad
        for name in self.stored:
            if name != "bias":
                delattr(self, name)
        self.stored = None
        self.weight = nn.Parameter(weight, requires_grad=trained)
        self.set_backend(default_backend())

    def extra_repr(self) -> str:
        rank = "" if self.lora_alpha is None else f", lora={self.lora_A.shape[0]}"
        return f"{super().extra_repr()}, backend={self.backend}{rank}"

    def _store(
        self, backend: Backend, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor] | None
    ) -> None:
        bias = None if self.bias is None else self.bias.detach()
        tensors = backend.initial_parameters(self.weight.detach(), bias) if given is None else given
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # as regions expect parameters
        made = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert made == shapes, f"{backend}: parameters of {made}, parameter_spec says {shapes}"
        trained = self.weight.requires_grad
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
        self.stored = shapes


def shapes_stored(layer: nn.Linear, backend: Backend) -> Mapping[str, tuple[int, ...]] | None:
    """What `layer` stores in place of weight and bias for `backend`, None: these. UserError where it cannot."""
    ours = layer if isinstance(layer, BackendLinear) else None
    if ours is not None and ours.stored is not None:
        if backend != ours.backend:
            raise UserError(
                f"This layer already stores {', '.join(ours.stored)} for backend {ours.backend}, so it cannot "
                f"change to {backend}. Start from the dense checkpoint."
            )
        return ours.stored
    shapes = backend.parameter_spec(layer.in_features, layer.out_features, layer.bias is not None)
    if shapes is not None and ours is not None and ours.lora_alpha is not None:
        raise UserError(
            f"This layer has a low-rank update (LoRA) of its weight, and backend {backend} stores "
            f"{', '.join(shapes)} instead of a weight. Merge the update first, or use another backend."
        )
    return shapes


class BackendAttention(Stateful):
    """Base of an attention layer whose two products, q kᵀ and weights · v, a backend computes: call `attend`."""

    backend: Backend
    compute_dtype: torch.dtype | None = None

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.set_backend(default_backend())

    def set_backend(self, backend: Backend) -> None:
        """Compute with `backend` from now on. Its state starts afresh."""
        self.backend = backend
        self.set_state(backend.attention_state(self.num_heads, self.head_dim), device_of(self))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float,
        is_causal: bool = True,
        articles: Tensor | None = None,
        drop: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """softmax(q kᵀ · scale) v: q [B, heads, S, head_dim], k and v [B, key_value_heads, S_kv, head_dim] → as q.

        `mask` is boolean, True = attend, broadcast to [B, 1, S, S_kv]; `is_causal` counts only without a mask.
        `articles`: int32 [2, B, S] of `backends.articles.article_spans`, in place of the mask that it stands for.
        `drop`: what training does to the weights [B, heads, S, S_kv] behind the softmax. UserError where the backend
        does not make them.
        """
        q, k, v = (cast(x, self.compute_dtype) for x in (q, k, v))
        backend = computed_by(self.backend)
        compute: Callable[..., Any]
        if drop is not None and self.training:
            if not backend.drops_attention():
                raise UserError(
                    f"Backend {backend} computes attention in one piece, whose weights cannot be dropped out. "
                    "Use model.attention_dropout=0, or another backend for attention."
                )
            mask = mask if articles is None else mask_of_spans(articles)
            compute = partial(backend.attention_of_products, mask=mask, is_causal=is_causal, drop=drop)
        elif articles is not None:
            compute = partial(backend.article_attention, articles=articles)
        else:
            compute = partial(backend.attention, mask=mask, is_causal=is_causal)
        out = self.call_with_state(
            lambda state: compute(q, k, v, scale=scale, state=state, training=self.training),
        )
        return _of_shape(out, (*q.shape[:-1], v.shape[-1]), backend, "attention")


def _of_shape(y: Tensor, shape: tuple[int, ...], backend: Backend, operation: str) -> Tensor:
    """`y`, checked: a model may go on with another shape and train to nothing (heads are what a view makes of them)."""
    if y.shape != shape:
        raise UserError(f"{operation} of backend {backend} returned {list(y.shape)}. Expected {list(shape)}.")
    return y


def unfuse(model: nn.Module) -> None:
    """Have torch's own encoder layers call their linears in evaluation too: fused, they read the weights themselves."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused path asks for one of the two
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # made for fused layers, and looks at their weights


def cast(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` in `dtype`; None: as it is."""
    return x if dtype is None or x.dtype == dtype else x.to(dtype)
