"""A backend's product as a call of a function that somebody else has: one operator that only names it.

A trace for MLIR that runs inside `external_calls()` holds such calls for every backend whose `mlir_function` says so;
everywhere else nothing changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from backends.base import Backend, State

_is_on = False


@contextmanager
def external_calls() -> Iterator[None]:
    """Products traced inside are calls, for the backends that want it."""
    global _is_on
    before, _is_on = _is_on, True
    try:
        yield
    finally:
        _is_on = before


def computed_by(backend: Backend) -> Backend:
    """`backend`, or inside `external_calls()` what calls its function."""
    return ExternalCalls(backend) if _is_on and backend.mlir_function() is not None else backend


class ExternalCalls(Backend):
    """Computes nothing: its products are calls of `inner.mlir_function()`, with the options of `inner` as attributes.

    Operands: x, weight (or the stored tensors), bias if there is one, state; results: y, the new state. Gradients
    are those of the plain product where `inner` says straight-through, else a call of `FUNCTION_backward`, whose last
    operand is y's gradient and whose results are those of the operands in floating point before the state.
    """

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner.config)
        self.inner = inner

    def linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        tensors = list(weight.values()) if isinstance(weight, dict) else [weight]
        operands = [x, *tensors, *([] if bias is None else [bias])]
        names = list(weight) if isinstance(weight, dict) else ["weight"] + ([] if bias is None else ["bias"])
        out = len(weight) if isinstance(weight, Tensor) else self._out_features(x, weight, state)
        plain = "linear" if isinstance(weight, Tensor) and self.inner.gradient == "straight-through" else ""
        return self._call("linear", operands, ["x", *names], [*x.shape[:-1], out], state, training, plain)

    def matmul(self, a: Tensor, b: Tensor, state: State, *, training: bool = False) -> tuple[Tensor, State]:
        plain = "matmul" if self.inner.gradient == "straight-through" else ""
        return self._call("matmul", [a, b], ["a", "b"], [*a.shape[:-1], b.shape[-1]], state, training, plain)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        state: State,
        training: bool = False,
    ) -> tuple[Tensor, State]:
        """Two calls with the softmax between them, or one where the backend computes attention in one piece."""
        given = {"mask": mask, "scale": scale, "is_causal": is_causal, "state": state, "training": training}
        if type(self.inner).attention is Backend.attention:
            return self.attention_of_products(q, k, v, **given)  # type: ignore[arg-type]
        operands, names = [q, k, v], ["q", "k", "v"]
        if mask is not None:
            operands, names = [*operands, mask], [*names, "mask"]
        more = {"scale": scale, "is_causal": is_causal and mask is None}
        return self._call("attention", operands, names, [*q.shape[:-1], v.shape[-1]], state, training, "", more)

    def drops_attention(self) -> bool:
        return self.inner.drops_attention() or type(self.inner).attention is Backend.attention

    def _out_features(self, x: Tensor, weight: dict[str, Tensor], state: State) -> int:
        """Of a layer that stores something else than a weight: asked of the backend itself, without data."""
        empty = {name: torch.empty_like(each, device="meta") for name, each in weight.items()}
        y, _ = self.inner.linear(torch.empty(1, x.shape[-1], dtype=x.dtype, device="meta"), empty, None, state)
        return y.shape[-1]

    def _call(
        self,
        product: str,
        operands: Sequence[Tensor],
        names: Sequence[str],
        shape: Sequence[int],
        state: State,
        training: bool,
        plain: str,
        more: dict[str, Any] | None = None,
    ) -> tuple[Tensor, State]:
        function = self.inner.mlir_function()
        assert function is not None
        options = {"config": self.inner.options(), "product": product, "training": training}
        attributes = {**options, "operands": [*names, *state], **(more or {})}
        specs = self.inner.attention_state(1, 1) if product == "attention" else self.inner.linear_state(1, 1)
        if product == "matmul":
            specs = self.inner.matmul_state()
        new = [name for name in state if specs[name].given is None]
        like = [len(operands) + list(state).index(name) for name in new]
        everything = [*operands, *state.values()]
        y, *values = external_call(
            everything, function, json.dumps(attributes), list(shape), like, len(operands), plain
        )
        return y, dict(zip(new, values, strict=True))


@torch.library.custom_op("substrate::external_call", mutates_args=())
def external_call(
    operands: list[Tensor],
    function: str,
    attributes: str,
    shape: list[int],
    like: list[int],
    differentiable: int,
    plain: str,
) -> list[Tensor]:
    """One result of `shape` in the dtype of the first operand (none if it is [-1]), then some like operands `like`.

    `differentiable`: operands before the state; `plain`: the product whose gradients are taken, or "".
    """
    raise NotImplementedError(f"'{function}' is a function of another program: it can be traced, not run.")


@external_call.register_fake
def _(
    operands: list[Tensor],
    function: str,
    attributes: str,
    shape: list[int],
    like: list[int],
    differentiable: int,
    plain: str,
) -> list[Tensor]:
    first = [] if shape == [-1] else [operands[0].new_empty(shape)]
    return [*first, *(torch.empty_like(operands[index]) for index in like)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    operands, ctx.function, ctx.attributes, _, like, ctx.differentiable, ctx.plain = inputs
    ctx.of_the_rest = (None, None, None, None if like else [], None, None)  # an empty list is a structure to torch
    ctx.save_for_backward(*operands)


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    operands, grad = list(ctx.saved_tensors), grads[0]
    given: list[Tensor | None] = [None] * len(operands)
    wanted = [i for i, each in enumerate(operands[: ctx.differentiable]) if each.is_floating_point()]
    if grad is None:
        return given, *ctx.of_the_rest
    if ctx.plain:
        found = _PLAIN[ctx.plain](grad, *operands[: ctx.differentiable])
    else:
        everything = [*operands, grad.contiguous()]
        found = external_call(everything, f"{ctx.function}_backward", ctx.attributes, [-1], wanted, len(everything), "")
    for index, gradient in zip(wanted, found, strict=True):
        given[index] = gradient
    return given, *ctx.of_the_rest


def _of_linear(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    rows = grad.reshape(-1, grad.shape[-1])
    found = [(rows @ weight).view(x.shape), rows.t() @ x.reshape(-1, x.shape[-1])]
    return found if bias is None else [*found, rows.sum(0)]


def _of_matmul(grad: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    return [grad @ b.transpose(-1, -2), a.transpose(-1, -2) @ grad]


_PLAIN: dict[str, Callable[..., list[Tensor]]] = {"linear": _of_linear, "matmul": _of_matmul}
external_call.register_autograd(_gradients, setup_context=_remember)
