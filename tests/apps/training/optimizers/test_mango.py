"""Mango against its formula in fp64, kind by kind; every kind has a rate that is really its own."""

import numpy as np
import pytest
import torch

from apps.training.optimizers.mango import Mango

KINDS = {  # name → role, shape, kind
    "model.layers.0.self_attn.q_proj.weight": ("matrix", (8, 8), "attn"),
    "model.layers.0.self_attn.k_proj.weight": ("matrix", (4, 8), "attn"),
    "model.layers.0.self_attn.o_proj.weight": ("matrix", (8, 8), "mat"),
    "model.layers.0.mlp.up_proj.weight": ("matrix", (12, 8), "mat"),
    "model.layers.0.mlp.down_proj.weight": ("matrix", (8, 12), "mat"),
    "model.embed_tokens.weight": ("embedding", (20, 8), "embedding"),
    "lm_head.weight": ("head", (20, 8), "head"),
    "model.norm.weight": ("vector", (8,), "vec_w"),
    "model.layers.0.self_attn.q_proj.bias": ("vector", (8,), "vec_b"),
}
RATES = {"attn": 0.01, "mat": None, "embedding": 0.3, "head": 0.02, "vec_w": 0.005, "vec_b": 0.07}
CONFIG = Mango.Config(
    lr=0.04, momentum=0.9, beta2=0.8, offset=0.97, eps=1e-6, weight_decay=0.1,
    **{f"{kind}_lr": rate for kind, rate in RATES.items()},
)  # fmt: skip


def normalized(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "vec_w":
        return np.sign(x)
    if kind == "vec_b":
        return x / (np.sqrt((x * x).sum()) + CONFIG.eps)
    if kind == "embedding":
        return np.stack([row / (np.sqrt((row * row).sum()) + CONFIG.eps) for row in x])
    left, values, right = np.linalg.svd(x, full_matrices=False)
    values = values / (np.linalg.norm(values) + 1e-7)
    for _ in range(CONFIG.ns_steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.sqrt(max(1.0, x.shape[0] / x.shape[1])) * (left * values) @ right


class Reference:
    """One parameter's Mango as published: precondition, momentum, norm, rate of its kind, offset."""

    def __init__(self, value: torch.Tensor, kind: str) -> None:
        self.value, self.kind = value.numpy().copy(), kind
        self.v, self.m, self.o = (np.zeros_like(self.value) for _ in range(3))

    def step(self, gradient: np.ndarray, share: float) -> None:
        """`share`: the schedule's rate as a share of its peak."""
        rate = share * (0.04 if RATES[self.kind] is None else RATES[self.kind])
        self.v = 0.8 * self.v + gradient**2
        scaled = gradient / (np.sqrt(self.v) + 1e-6)
        self.m = 0.9 * self.m + scaled
        moved = -rate * normalized(self.kind, scaled + 0.9 * self.m)
        self.o = 0.97 * self.o + 0.03 * moved
        decay = 0.0 if self.kind.startswith("vec") else rate * 0.1
        self.value = self.value * (1 - decay) + moved + self.o


def test_fifty_steps_of_every_kind_equal_the_formula_in_fp64() -> None:
    generator = torch.Generator().manual_seed(0)
    mine = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, (_, shape, _) in KINDS.items()}
    theirs = {name: Reference(each, KINDS[name][2]) for name, each in mine.items()}
    parts = {name: Mango.part(name, shape, role) for name, (role, shape, _) in KINDS.items()}
    assert len(set(parts.values())) == 6
    states = {name: dict.fromkeys(Mango.state_names, torch.zeros_like(each)) for name, each in mine.items()}
    for step in range(1, 51):
        gradients = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** (step % 5 - 3)
            for name, (_, shape, _) in KINDS.items()
        }
        gradients["model.embed_tokens.weight"][step % 7] = 0  # a token that is not in the batch
        for part in set(parts.values()):
            names = [name for name in parts if parts[name] is part]
            chosen = [{name: each[name] for name in names} for each in (mine, gradients, states)]
            hypers = {}
            for name in names:
                numbers = part.hyperparameters(CONFIG, step, 0.04 / step, KINDS[name][0] != "vector")
                assert tuple(numbers) == part.hyperparameter_names
                hypers[name] = {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}
            for name, (value, state) in part(ns_steps=6).update_group(*chosen, hypers).items():
                mine[name], states[name] = value, state
        for name, reference in theirs.items():
            reference.step(gradients[name].numpy(), 1 / step)
            assert np.abs(mine[name].numpy() - reference.value).max() <= 1e-10, name


@pytest.mark.parametrize("kind", RATES)
def test_the_rate_of_a_kind_moves_that_kind_alone(kind: str) -> None:
    parts = {kind: Mango.part(name, shape, role) for name, (role, shape, kind) in KINDS.items()}
    config = Mango.Config(lr=0.05, **{f"{kind}_lr": 0.2})
    for other, part in parts.items():
        rate = part.hyperparameters(config, 3, 0.025, True)["lr"]
        assert rate == pytest.approx(0.1 if other == kind else 0.025)


def test_without_offset_and_nesterov_only_the_direction_of_the_momentum_is_left() -> None:
    config = Mango.Config(lr=0.1, offset=0.0, nesterov=False, momentum=0.5)
    part = Mango.part("model.norm.weight", (3,), "vector")
    hyper = {k: torch.tensor(v, dtype=torch.float64) for k, v in part.hyperparameters(config, 1, 0.1, False).items()}
    state = {"square_sum": torch.zeros(3), "momentum": torch.tensor([3.0, -4.0, 0.0]), "offset": torch.ones(3)}
    state = {name: value.double() for name, value in state.items()}
    ones = torch.ones(3, dtype=torch.float64)
    new, _ = part().update_group({"w": ones}, {"w": 0 * ones}, {"w": state}, {"w": hyper})["w"]
    assert new.tolist() == pytest.approx([0.9, 1.1, 1.0])


def test_the_defaults_are_the_published_ones() -> None:
    config = Mango.Config()
    assert (config.lr, config.offset, config.momentum, config.beta2, config.eps) == (0.05, 0.99, 0.95, 0.95, 1e-8)
    assert (config.ns_steps, config.nesterov, config.weight_decay) == (6, True, 0.0)
    assert {getattr(config, f"{kind}_lr") for kind in RATES} == {None}
