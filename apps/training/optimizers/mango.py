"""Mango: every kind of parameter moves by a length of its own norm (https://github.com/ZQZCalin/trainit, `mango`).

Momentum with Advanced Normalization, Gradient preconditioning and Offset. The kinds: matrices of the blocks, the
projections to queries, keys and values, the embedding, the head, weights of norms, biases; each has its own rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apps.training.config_schema import setting
from apps.training.optimizers._base import Optimizer
from apps.training.optimizers._newton_schulz import orthogonalized

if TYPE_CHECKING:
    from torch import Tensor


class Mango(Optimizer):
    """V = β₂·V + G²;  U = G/(√V + ε);  M = μ·M + U;  D = −lr·norm(U + μ·M);  O = β·O + (1−β)·D;  p = p + D + O.

    `norm`: Newton-Schulz × √max(1, rows/columns) for matrices and the head, each token's row of the embedding by its
    length, the sign for weights of norms, a bias by its length. V is a sum, not a mean: a first U has length 1.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=mango`."""

        lr: float = setting(0.05, "peak learning rate of every kind that has none of its own", above=0)
        mat_lr: float | None = setting(None, "matrices of the blocks; null: lr", at_least=0)
        attn_lr: float | None = setting(None, "projections to queries, keys, values; null: lr", at_least=0)
        embedding_lr: float | None = setting(None, "embedding; null: lr", at_least=0)
        head_lr: float | None = setting(None, "projection to the vocabulary; null: lr", at_least=0)
        vec_w_lr: float | None = setting(None, "weights of norms; null: lr", at_least=0)
        vec_b_lr: float | None = setting(None, "biases; null: lr", at_least=0)
        momentum: float = setting(0.95, "share of the last momentum that is kept", at_least=0, below=1)
        nesterov: bool = setting(True, "look ahead: the gradient once more beside the momentum")
        beta2: float = setting(0.95, "decay of the sum of squared gradients", at_least=0, below=1)
        eps: float = setting(1e-8, "added to every denominator", above=0)
        offset: float = setting(0.99, "decay of the running mean of updates, added again; 0: none", at_least=0, below=1)
        weight_decay: float = setting(0.0, "decoupled decay; norms and biases are exempt", at_least=0)
        ns_steps: int = setting(6, "Newton-Schulz rounds; fixed by the artifact", at_least=1)

    label = "mat"
    rate: ClassVar[str] = "mat_lr"
    state_names = ("square_sum", "momentum", "offset")
    hyperparameter_names = (
        "lr",
        "momentum",
        "gradient_share",
        "momentum_share",
        "beta2",
        "eps",
        "offset",
        "one_minus_offset",
        "offset_share",
        "weight_decay",
    )
    structure: ClassVar[tuple[str, ...]] = ("ns_steps",)

    @classmethod
    def part(cls, name: str, shape: tuple[int, ...], role: str) -> type[Optimizer]:
        """The kind of a parameter, a class of this file each."""
        if role == "vector" or len(shape) != 2:
            return _VecB if name.split(".")[-1] == "bias" else _VecW
        if role == "matrix":
            return _Attn if {"q_proj", "k_proj", "v_proj"} & set(name.split(".")) else Mango
        return {"embedding": _Embedding, "head": _Head}[role]

    @classmethod
    def hyperparameters(cls, config: Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of one update; a kind with a rate of its own has the schedule's share of that."""
        own = getattr(config, cls.rate)
        rate = lr if own is None else lr / config.lr * own
        return {
            "lr": rate,
            "momentum": config.momentum,
            "gradient_share": 1.0 if config.nesterov else 0.0,
            "momentum_share": config.momentum if config.nesterov else 1.0,
            "beta2": config.beta2,
            "eps": config.eps,
            "offset": config.offset,
            "one_minus_offset": 1.0 - config.offset,
            "offset_share": 1.0 if config.offset else 0.0,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }

    def update_group(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        hypers: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """All tensors of one kind in a block at once: those of equal shape are multiplied together."""
        new, ahead = {}, []
        for name, gradient in gradients.items():
            hyper, state = hypers[name], states[name]
            square_sum = hyper["beta2"] * state["square_sum"] + gradient * gradient
            scaled = gradient / (square_sum.sqrt() + hyper["eps"])
            momentum = hyper["momentum"] * state["momentum"] + scaled
            new[name] = {"square_sum": square_sum, "momentum": momentum}
            ahead.append(hyper["gradient_share"] * scaled + hyper["momentum_share"] * momentum)
        results = {}
        directions = self.normalized(ahead, [hypers[name]["eps"] for name in gradients])
        for name, direction in zip(gradients, directions, strict=True):
            hyper = hypers[name]
            moved = -hyper["lr"] * direction
            offset = hyper["offset"] * states[name]["offset"] + hyper["one_minus_offset"] * moved
            kept = parameters[name] * (1 - hyper["lr"] * hyper["weight_decay"])
            results[name] = (kept + moved + hyper["offset_share"] * offset, new[name] | {"offset": offset})
        return results

    def normalized(self, tensors: Sequence[Tensor], eps: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, each divided by what its kind takes for its length."""
        return orthogonalized(tensors, self.fixed["ns_steps"])


class _Attn(Mango):
    label, rate = "attn", "attn_lr"


class _Head(Mango):
    label, rate = "head", "head_lr"


class _Embedding(Mango):
    label, rate, structure = "embedding", "embedding_lr", ()

    def normalized(self, tensors: Sequence[Tensor], eps: Sequence[Tensor]) -> list[Tensor]:
        """A token's row by its length: one column of the matrix that maps one-hot tokens to vectors."""
        return [x / (x.norm(dim=1, keepdim=True) + e) for x, e in zip(tensors, eps, strict=True)]


class _VecW(Mango):
    label, rate, structure = "vec_w", "vec_w_lr", ()

    def normalized(self, tensors: Sequence[Tensor], eps: Sequence[Tensor]) -> list[Tensor]:
        return [x.sign() for x in tensors]


class _VecB(Mango):
    label, rate, structure = "vec_b", "vec_b_lr", ()

    def normalized(self, tensors: Sequence[Tensor], eps: Sequence[Tensor]) -> list[Tensor]:
        return [x / (x.norm() + e) for x, e in zip(tensors, eps, strict=True)]
