"""AdamW against torch.optim.AdamW, and what it refuses."""

import subprocess
import sys

import pytest
import torch

from apps.training import optimizers
from apps.training.optimizers.adamw import AdamW
from backends.errors import UserError


@pytest.mark.parametrize("decayed", [True, False])
def test_fifty_steps_equal_torchs_adamw_in_fp64(decayed: bool) -> None:
    config = AdamW.Config(lr=3e-2, weight_decay=0.3, beta1=0.85, beta2=0.97, eps=1e-7)
    generator = torch.Generator().manual_seed(0)
    mine = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    theirs = mine.clone().requires_grad_()
    reference = torch.optim.AdamW(
        [theirs], betas=(0.85, 0.97), eps=1e-7, weight_decay=config.weight_decay if decayed else 0.0
    )
    state = {name: torch.zeros_like(mine) for name in AdamW.state_names}
    for step in range(1, 51):
        lr = config.lr / step  # a rate that moves: it must reach the update as given, not as config.lr
        gradient = torch.randn(mine.shape, generator=generator, dtype=mine.dtype) * 10 ** (step % 5 - 3)
        numbers = AdamW.hyperparameters(config, step, lr, decayed)
        hyper = {name: torch.tensor(value, dtype=mine.dtype) for name, value in numbers.items()}
        mine, state = AdamW().update(mine, gradient, state, hyper)
        theirs.grad = gradient
        reference.param_groups[0]["lr"] = lr
        reference.step()
        assert (mine - theirs).abs().max() <= 1e-10


def test_the_update_leaves_its_inputs_alone_and_names_all_its_hyperparameters() -> None:
    numbers = AdamW.hyperparameters(AdamW.Config(), 1, 1e-3, True)
    assert tuple(numbers) == AdamW.hyperparameter_names
    parameter, gradient = torch.ones(3), torch.ones(3)
    state = {name: torch.zeros(3) for name in AdamW.state_names}
    _, new_state = AdamW().update(parameter, gradient, state, {k: torch.tensor(v) for k, v in numbers.items()})
    assert parameter.eq(1).all()
    assert all(value.eq(0).all() for value in state.values())
    assert tuple(new_state) == AdamW.state_names


def test_the_first_step_moves_by_the_rate_whatever_the_gradients_size() -> None:
    for size in (1e-6, 1e6):
        numbers = AdamW.hyperparameters(AdamW.Config(weight_decay=0.0, eps=0.0), 1, 0.01, True)
        hyper = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        zero = torch.zeros(1, dtype=torch.float64)
        moved, _ = AdamW().update(zero, zero + size, {"exp_avg": zero, "exp_avg_sq": zero}, hyper)
        assert moved.item() == pytest.approx(-0.01, rel=1e-12)


def test_optimizers_are_found_by_file_name_and_a_near_miss_is_suggested() -> None:
    assert "adamw" in optimizers.available()
    assert "_base" not in optimizers.available()
    assert optimizers.load("adamw") is AdamW
    with pytest.raises(UserError, match=r"Unknown optimizer 'adamww'\. Did you mean 'adamw'\?"):
        optimizers.load("adamww")


def test_loading_an_optimizer_or_a_schedule_does_not_import_torch() -> None:
    code = (
        "import sys; from apps.training import optimizers, schedules; "
        "optimizers.load('adamw'); schedules.load('linear'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
