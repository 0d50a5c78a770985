"""The interface of a backend: a linear layer and attention's two matmuls as pure functions of tensors.

A backend is immutable: it holds a frozen Config and nothing else. What it must remember between calls (statistics,
random-number counters) is state: it goes in as a dict of tensors and comes out as a new one, so that a compiled region
stays a pure graph, recomputing activations cannot update a statistic twice, and a checkpoint can hold it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from backends.articles import mask_of_spans
from backends.errors import UserError
from backends.options import build_config

State = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """A buffer that a layer keeps for its backend. `dtype` is torch's name for it; every element starts at `fill`.

    All microbatches of a step, on all workers, read the state from before the step. The new values they return become
    one by `reduce`, elementwise, and that is the state after it: the same however a step's rows are dealt. Smallest and
    largest values, moving averages of them and counters are combined exactly by "min" and "max".

    `given`: not the backend's to return, but filled in for it (int64, shape ()). "first_row" is the number, within the
    rows of the step, of the first entry along dim 0 of the layer's input (in a plain PyTorch loop 0): random numbers
    counted from it do not depend on which worker computes which rows. "layer" is a number made of the layer's name:
    with it, equal layers draw different ones.

    An infinite `fill` says that nothing was seen yet. Evaluation with such a state is refused.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    fill: float = 0.0
    reduce: Literal["mean", "min", "max"] = "mean"
    given: Literal["first_row", "layer"] | None = None

    def __post_init__(self) -> None:
        is_mean_of_integers = self.reduce == "mean" and not self.dtype.startswith(("float", "bfloat"))
        if is_mean_of_integers and self.given is None:
            raise UserError(
                f"State of dtype {self.dtype} has no exact mean. Expected StateSpec(…, reduce='max' or 'min')."
            )


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one product costs: floating-point operations, bytes moved, joules (None: no energy model)."""

    flops: float
    bytes: float
    joules: float | None = None


class Backend:
    """Derive, name the options in Config, override `linear` and/or `matmul`. See docs/own-backend.md."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        """The backend's options, with their defaults. A subclass replaces this with a frozen dataclass of its own."""

    # "exact": the backward is the derivative of what forward computes.
    # "straight-through": the backward is that of the plain product (dX = dY W, dW = dYᵀ X), whatever forward rounds.
    # "rounded": straight-through, and these two products take rounded operands themselves (by less than a tenth).
    gradient: ClassVar[Literal["exact", "straight-through", "rounded"]] = "exact"
    # Layers that read the same input may be one product over their weights, one below the other: `linear` computes each
    # output from its own row of the weight and from x, and keeps no state (see backends/joint.py).
    joins_rows: ClassVar[bool] = False
    # The same for a backend that stores other parameters: the one matrix [rows, in] of them that x is multiplied by, in
    # `linear` as x · matrixᵀ; `behind_input_matrix` is the rest of `linear`.
    input_matrix: ClassVar[str | None] = None
    # Further modules whose source decides what is computed (kernels); they enter the fingerprint.
    source_modules: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any = None):
        self.config = self.Config() if config is None else config

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Backend:
        """Build from the options of a rule; each problem with them is a UserError."""
        return cls(build_config(cls.Config, options, cls.backend_name()))

    @classmethod
    def backend_name(cls) -> str:
        """What a rule calls this backend: the file name for one of the house, else `package.module:Class`."""
        package, _, file = cls.__module__.rpartition(".")
        return file if package == __package__ else f"{cls.__module__}:{cls.__qualname__}"

    # ---- what a backend computes -------------------------------------------------------------------------------

    def linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, state: State, *, training: bool = False
    ) -> tuple[Tensor, State]:
        """y [..., out] = x [..., in] · weight[out, in]ᵀ + bias[out], and the new state.

        All tensors come in the layer's compute dtype; y leaves in the same. With a `parameter_spec`, `weight` is the
        dict of those tensors and `bias` is None. In evaluation (`training` false) the returned state is not kept.
        The new state has every name of `linear_state` but those that are given.
        """
        raise NotImplementedError

    def behind_input_matrix(self, product: Tensor, weight: Any) -> Tensor:
        """y [..., out] from x · matrixᵀ [..., rows], with `weight` as for `linear`. With an `input_matrix` only."""
        raise NotImplementedError

    def matmul(self, a: Tensor, b: Tensor, state: State, *, training: bool = False) -> tuple[Tensor, State]:
        """out [B, H, M, N] = a [B, H, M, K] · b [B, H, K, N], and the new state (names as in `matmul_state`)."""
        raise NotImplementedError

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
        """softmax(q kᵀ · scale) v, [B, heads, S, head_dim], from two `matmul`s with the softmax in at least float32.

        k and v [B, key_value_heads, S_kv, head_dim] are never repeated. `mask` is boolean, True = attend, broadcast to
        [B, 1, S, S_kv]; a query that may attend nothing gets zeros. Without a mask, `is_causal` lets query i see keys
        0…i; a single query (decoding) sees all.
        """
        return self.attention_of_products(
            q, k, v, mask=mask, scale=scale, is_causal=is_causal, state=state, training=training
        )

    def article_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        articles: Tensor,
        scale: float,
        state: State,
        training: bool = False,
    ) -> tuple[Tensor, State]:
        """`attention` with the mask of packed articles: int32 [2, B, S], see `backends.articles.article_spans`."""
        mask = mask_of_spans(articles)
        return self.attention(q, k, v, mask=mask, scale=scale, is_causal=False, state=state, training=training)

    def drops_attention(self) -> bool:
        """Whether `attention_of_products` is this backend's attention, so that its weights can be dropped out."""
        return type(self).attention is Backend.attention

    def attention_of_products(
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
        drop: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """`attention` with every weight computed; `drop` changes the weights [B, heads, S, S_kv] behind the softmax."""
        batch, heads, queries, head_dim = q.shape
        groups, keys = k.shape[1], k.shape[2]
        # The heads that share a key head become more rows of one product.
        rows = q.reshape(batch, groups, heads // groups * queries, head_dim)
        scores, new_scores = self.matmul(rows, k.transpose(-1, -2), _part("scores", state), training=training)
        scores = scores.view(batch, heads, queries, keys).to(torch.promote_types(scores.dtype, torch.float32)) * scale
        if mask is None and is_causal and queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
        if mask is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~mask, 0.0)
        weights = weights if drop is None else drop(weights)
        weights = weights.to(q.dtype).view(batch, groups, heads // groups * queries, keys)
        out, new_values = self.matmul(weights, v, _part("values", state), training=training)
        new_state = {f"scores_{name}": tensor for name, tensor in new_scores.items()}
        new_state |= {f"values_{name}": tensor for name, tensor in new_values.items()}
        return out.view(batch, heads, queries, v.shape[-1]), new_state

    # ---- what it needs to remember and to store ----------------------------------------------------------------

    def linear_state(self, in_features: int, out_features: int) -> dict[str, StateSpec]:
        """The buffers of one linear layer."""
        return {}

    def matmul_state(self) -> dict[str, StateSpec]:
        """The buffers of one matmul."""
        return {}

    def attention_state(self, num_heads: int, head_dim: int) -> dict[str, StateSpec]:
        """The buffers of one attention layer: those of its two matmuls, prefixed `scores_` and `values_`."""
        specs = self.matmul_state()
        return {f"{product}_{name}": spec for product in ("scores", "values") for name, spec in specs.items()}

    def mlir_function(self) -> str | None:
        """The name of an external function that MLIR modules call for its products, with its options as attributes;
        None: they are spelled out in standard operators. See docs/mlir.md."""
        return None

    def parameter_spec(self, in_features: int, out_features: int, bias: bool) -> dict[str, tuple[int, ...]] | None:
        """Names and shapes of what a linear layer stores instead of weight and bias; None: it stores these."""
        return None

    def initial_parameters(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The tensors of `parameter_spec`, made from a dense layer's weight [out, in] and bias [out]."""
        raise NotImplementedError

    # ---- what it is ----------------------------------------------------------------------------------------------

    def cost(self, m: int, k: int, n: int, *, itemsize: int = 4) -> Cost:
        """One product [m, k] · [k, n] of elements of `itemsize` bytes; by default that of a dense one."""
        return Cost(flops=2.0 * m * k * n, bytes=float(itemsize) * (m * k + k * n + m * n))

    def cost_constants(self) -> list[tuple[str, str, str]]:
        """What `cost` stands on, for a report: name, value with unit, source (or "assumption: …")."""
        return []

    def computes(self, kind: Literal["linear", "attention"]) -> bool:
        """Whether this backend overrides what a layer of `kind` needs."""
        methods = ("linear",) if kind == "linear" else ("matmul", "attention")
        return any(getattr(type(self), method) is not getattr(Backend, method) for method in methods)

    def options(self) -> dict[str, Any]:
        """The config as plain values, as a rule would give them."""
        return dataclasses.asdict(self.config)

    def fingerprint(self) -> str:
        """sha256 of the source of every module that decides the numbers, and of the config.

        An artifact stores it: one made with another version of the backend is refused.
        """
        names = [cls.__module__ for cls in type(self).__mro__ if issubclass(cls, Backend)]
        digest = hashlib.sha256(f"{self.name} {sorted(self.options().items())!r}".encode())
        for name in dict.fromkeys([*names, *self.source_modules]):
            digest.update(_source(name).encode())
        return digest.hexdigest()

    @property
    def name(self) -> str:
        """See `backend_name`."""
        return type(self).backend_name()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.config == getattr(other, "config", None)

    def __hash__(self) -> int:
        return hash((type(self), repr(self.config)))

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options().items())
        return f"{self.name}({options})" if options else self.name


def parameter_count(spec: Mapping[str, tuple[int, ...]]) -> int:
    """Elements in all tensors of a `parameter_spec`."""
    return sum(math.prod(shape) for shape in spec.values())


def _part(product: str, state: State) -> State:
    return {name.removeprefix(f"{product}_"): t for name, t in state.items() if name.startswith(f"{product}_")}


def _source(module_name: str) -> str:
    __import__(module_name)
    try:
        return inspect.getsource(sys.modules[module_name])
    except (OSError, TypeError) as error:
        raise UserError(
            f"The source of module '{module_name}' cannot be read, so an artifact could not tell one version of this "
            "backend from another. Define the backend in a .py file."
        ) from error
