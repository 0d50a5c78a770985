"""What a run is measured by: the peak that is given or known, and a floor that was measured on the same device."""

import dataclasses
from pathlib import Path

import pytest
import torch

from apps.training.efficiency import efficiency_of
from apps.training.step_plan import plan_step
from apps.training.workers.group import Workers
from apps.training.workers.launch import Launch
from compiled.artifact import Artifact
from tests.apps.training.plans import settings_of, write_config

CPU = torch.device("cpu")


def artifact(**floor: object) -> Artifact:
    return Artifact(Path("x.substrate"), {"floor": floor} if floor else {})


def test_peak_and_floor_are_of_all_workers(tmp_path: Path) -> None:
    config = settings_of(write_config(tmp_path / "tiny"), "run.peak_flops=1e12")
    plan, alone = plan_step(config), Workers.solo()
    one = efficiency_of(config, plan, None, CPU, alone, 1)
    assert (one.peak, one.floor) == (1e12, None)
    stored = artifact(device="CPU", microbatch_seconds=0.5, update_seconds=0.25)
    assert efficiency_of(config, plan, stored, CPU, alone, 3).floor == pytest.approx(1.75)
    four = Workers(Launch(rank=0, world_size=4))
    several = efficiency_of(config, plan, stored, CPU, four, 3)
    assert (several.flops, several.peak) == (12 * one.flops, 4e12)
    assert several.floor == pytest.approx(1.75)
    shared = dataclasses.replace(config, training=dataclasses.replace(config.training, shard_optimizer=True))
    assert efficiency_of(shared, plan, stored, CPU, four, 3).floor == pytest.approx(1.5 + 0.25 / 4)


def test_a_floor_of_another_device_says_nothing(tmp_path: Path) -> None:
    config = settings_of(write_config(tmp_path / "tiny"))
    plan = plan_step(config)
    for stored in (artifact(device="NVIDIA H200", microbatch_seconds=0.5, update_seconds=0.25), artifact()):
        found = efficiency_of(config, plan, stored, CPU, Workers.solo(), 1)
        assert (found.peak, found.floor) == (None, None)
