"""Muon against its formula in fp64, the Newton–Schulz rounds by singular values; AdamW for everything else."""

import numpy as np
import pytest
import torch
from torch import Tensor

from apps.training.optimizers.adamw import AdamW
from apps.training.optimizers.muon import Muon

SHAPES = {"q": (8, 8), "k": (4, 8), "up": (12, 8), "down": (8, 12), "v": (4, 8), "o": (8, 8)}


def tensors(numbers: dict[str, float]) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}


def orthogonal(matrix: np.ndarray, rounds: int) -> np.ndarray:
    """√max(1, rows/columns) U p(…p(s / ‖s‖)) Vᵀ."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (np.linalg.norm(values) + 1e-7)
    for _ in range(rounds):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.sqrt(max(1.0, matrix.shape[0] / matrix.shape[1])) * (left * values) @ right


@pytest.mark.parametrize(("nesterov", "rounds", "decayed"), [(True, 5, True), (False, 6, True), (True, 5, False)])
def test_fifty_steps_of_a_block_equal_the_formula_in_fp64(nesterov: bool, rounds: int, decayed: bool) -> None:
    config = Muon.Config(lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=0.3, ns_steps=rounds)
    generator = torch.Generator().manual_seed(0)
    mine = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    theirs = {name: each.numpy().copy() for name, each in mine.items()}
    momentum = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    states = {name: {"momentum": torch.zeros_like(each)} for name, each in mine.items()}
    muon = Muon(ns_steps=rounds)
    for step in range(1, 51):
        lr = config.lr / step  # a rate that moves: it must reach the update as given, not as config.lr
        gradients = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) * 10 ** (step % 5 - 3)
            for name, shape in SHAPES.items()
        }
        hyper = tensors(Muon.hyperparameters(config, step, lr, decayed))
        new = muon.update_group(mine, gradients, states, dict.fromkeys(mine, hyper))
        mine, states = ({name: pair[part] for name, pair in new.items()} for part in (0, 1))
        for name, gradient in gradients.items():
            momentum[name] = 0.9 * momentum[name] + gradient.numpy()
            ahead = gradient.numpy() + 0.9 * momentum[name] if nesterov else momentum[name]
            theirs[name] = theirs[name] * (1 - lr * 0.3 * decayed) - lr * orthogonal(ahead, rounds)
            assert np.abs(mine[name].numpy() - theirs[name]).max() <= 1e-10


def test_a_step_turns_the_same_way_as_torchs_muon() -> None:
    """torch.optim.Muon always multiplies in bfloat16, so it agrees to that only."""
    generator = torch.Generator().manual_seed(1)
    mine = torch.randn(24, 16, generator=generator)
    theirs = mine.clone().requires_grad_()
    reference = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.95)
    states = {"w": {"momentum": torch.zeros_like(mine)}}
    config = Muon.Config(lr=0.02, weight_decay=0.1)
    hyper = {name: value.float() for name, value in tensors(Muon.hyperparameters(config, 1, 0.02, True)).items()}
    for _ in range(3):
        gradient = torch.randn(24, 16, generator=generator)
        before, theirs.grad = mine, gradient
        mine, states["w"] = Muon(ns_steps=5).update_group({"w": mine}, {"w": gradient}, states, {"w": hyper})["w"]
        reference.step()
        assert (mine - theirs).norm() <= 0.05 * (mine - before).norm()


def test_the_first_step_is_orthogonal_whatever_the_gradients_size() -> None:
    generator = torch.Generator().manual_seed(2)
    gradient = torch.randn(6, 10, generator=generator, dtype=torch.float64)
    hyper = tensors(Muon.hyperparameters(Muon.Config(weight_decay=0.0), 1, 1.0, True))
    zero = torch.zeros_like(gradient)
    for size in (1e-3, 1e6):
        states = {"w": {"momentum": zero}}
        moved, _ = Muon(ns_steps=5).update_group({"w": zero}, {"w": gradient * size}, states, {"w": hyper})["w"]
        lengths = torch.linalg.svdvals(moved)
        assert lengths.min() > 0.5
        assert lengths.max() < 1.3


def test_hidden_matrices_are_muons_and_everything_else_adamws_with_settings_of_its_own() -> None:
    assert Muon.part("model.layers.0.mlp.up_proj.weight", (12, 8), "matrix") is Muon
    other = Muon.part("model.embed_tokens.weight", (64, 8), "embedding")
    for name, shape, role in [("lm_head.weight", (64, 8), "head"), ("model.norm.weight", (8,), "vector")]:
        assert Muon.part(name, shape, role) is other
    config = Muon.Config(lr=0.05, adamw_lr=2e-3, adamw_beta1=0.8, adamw_beta2=0.9, adamw_eps=1e-5)
    got = other.hyperparameters(config, 7, 0.05 * 0.25, True)  # a quarter of the peak, by the schedule
    wanted = AdamW.hyperparameters(AdamW.Config(beta1=0.8, beta2=0.9, eps=1e-5, weight_decay=0.0), 7, 2e-3 * 0.25, True)
    assert got == pytest.approx(wanted, rel=1e-12)
    generator = torch.Generator().manual_seed(3)
    value, gradient, mean, square = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    state = {"exp_avg": mean, "exp_avg_sq": square.square()}
    # the Nesterov of Muon's settings is that of the matrices
    ours, _ = other(**{key: getattr(config, key) for key in other.structure}).update(
        value, gradient, state, tensors(got)
    )
    theirs, _ = AdamW(nesterov=False).update(value, gradient, state, tensors(got))
    assert torch.equal(ours, theirs)


def test_the_defaults_are_the_published_ones() -> None:
    config = Muon.Config()
    assert (config.lr, config.momentum, config.nesterov, config.ns_steps) == (0.05, 0.95, True, 5)
    assert (config.adamw_lr, config.adamw_beta1, config.adamw_beta2, config.adamw_eps) == (3e-4, 0.95, 0.95, 1e-8)
    assert (config.weight_decay, config.adamw_weight_decay) == (0.0, 0.0)
