"""Random tokens in the dtypes that a step takes them in."""

from pathlib import Path

import pytest
import torch

from apps.training.random_step import random_batch
from apps.training.step_plan import plan_step
from tests.apps.training.plans import settings_of, write_config


@pytest.mark.parametrize(("logits", "scale"), [("bfloat16", torch.float32), ("float64", torch.float64)])
def test_the_weight_of_a_position_is_as_wide_as_the_trainers(tmp_path: Path, logits: str, scale: torch.dtype) -> None:
    config = settings_of(write_config(tmp_path / "tiny"), "model.dtype=bfloat16", f"model.logits_dtype={logits}")
    batch = random_batch(plan_step(config), torch.device("cpu"), accumulation=2)
    assert batch["grad_scale"].dtype == scale
    assert batch["grad_scale"].sum().item() == pytest.approx(1 / 2)
