"""Muon: momentum whose matrices are made orthogonal (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).

Hidden matrices only. The embedding, the head and all vectors have AdamW, with rate and decays of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.training.config_schema import setting
from apps.training.optimizers import _adam
from apps.training.optimizers._base import Optimizer
from apps.training.optimizers._newton_schulz import orthogonalized
from apps.training.optimizers.adamw import AdamW

if TYPE_CHECKING:
    from torch import Tensor


class Muon(Optimizer):
    """M = μ·M + G;  p = (1 − lr·λ)·p − lr · √max(1, rows/columns) · NS(G + μ·M), or NS(M) without Nesterov."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of `optimizer=muon`."""

        lr: float = setting(0.05, "peak learning rate of hidden matrices", above=0)
        momentum: float = setting(0.95, "share of the last momentum that is kept", at_least=0, below=1)
        nesterov: bool = setting(True, "look ahead: the gradient once more beside the momentum")
        weight_decay: float = setting(0.0, "decoupled decay of hidden matrices", at_least=0)
        ns_steps: int = setting(5, "Newton-Schulz rounds; fixed by the artifact", at_least=1)
        adamw_lr: float = setting(3e-4, "peak learning rate of embedding, head, vectors; same schedule", above=0)
        adamw_beta1: float = setting(0.95, "their AdamW's decay of the mean", at_least=0, below=1)
        adamw_beta2: float = setting(0.95, "their AdamW's decay of the square", at_least=0, below=1)
        adamw_eps: float = setting(1e-8, "their AdamW's addition to the denominator", at_least=0)
        adamw_weight_decay: float = setting(0.0, "decay of embedding and head", at_least=0)

    state_names = ("momentum",)
    hyperparameter_names = ("lr", "momentum", "gradient_share", "momentum_share", "weight_decay")
    structure = ("ns_steps",)

    @classmethod
    def part(cls, name: str, shape: tuple[int, ...], role: str) -> type[Optimizer]:
        """Matrices of the blocks are Muon's, everything else AdamW's."""
        return cls if role == "matrix" and len(shape) == 2 else _MuonAdamW

    @staticmethod
    def hyperparameters(config: Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        """The numbers of one update of a matrix; Nesterov or not is a matter of two factors."""
        return {
            "lr": lr,
            "momentum": config.momentum,
            "gradient_share": 1.0 if config.nesterov else 0.0,
            "momentum_share": config.momentum if config.nesterov else 1.0,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }

    def update_group(
        self,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        hypers: Mapping[str, Mapping[str, Tensor]],
    ) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
        """All matrices of a block at once: those of equal shape are multiplied together."""
        momenta, ahead = {}, []
        for name, gradient in gradients.items():
            hyper = hypers[name]
            momenta[name] = hyper["momentum"] * states[name]["momentum"] + gradient
            ahead.append(hyper["gradient_share"] * gradient + hyper["momentum_share"] * momenta[name])
        results = {}
        for name, direction in zip(gradients, orthogonalized(ahead, self.fixed["ns_steps"]), strict=True):
            hyper = hypers[name]
            kept = parameters[name] * (1 - hyper["lr"] * hyper["weight_decay"])
            results[name] = (kept - hyper["lr"] * direction, {"momentum": momenta[name]})
        return results


class _MuonAdamW(Optimizer):
    """AdamW by Muon's own settings for what is not a hidden matrix; `nesterov` is none of them."""

    label = "adamw"
    state_names = _adam.STATE_NAMES
    hyperparameter_names = _adam.HYPERPARAMETER_NAMES

    @staticmethod
    def hyperparameters(config: Muon.Config, step: int, lr: float, decayed: bool) -> dict[str, float]:
        own = AdamW.Config(
            beta1=config.adamw_beta1,
            beta2=config.adamw_beta2,
            eps=config.adamw_eps,
            weight_decay=config.adamw_weight_decay,
        )
        return _adam.hyperparameters(own, step, lr / config.lr * config.adamw_lr, decayed)

    def update(
        self, parameter: Tensor, gradient: Tensor, state: Mapping[str, Tensor], hyper: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        step, new_state = _adam.step_along(gradient, state, hyper)
        return parameter * (1 - hyper["lr"] * hyper["weight_decay"]) - step, new_state
