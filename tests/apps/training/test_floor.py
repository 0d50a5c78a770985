"""The floor's work against counting the weights of the model; its sums by a clock whose seconds are FLOPs."""

import dataclasses
from pathlib import Path

import pytest
import torch

from apps.training.floor import floor_of, products_of, update_bytes
from apps.training.floor_timing import Stopwatch, Times
from apps.training.reporting.throughput import training_flops_per_token
from apps.training.step_plan import StepPlan, plan_step
from tests.apps.training.plans import settings_of, write_config

TOKENS = 2 * 16


class FlopsClock:
    """A second for each FLOP, a second for each byte."""

    copy_bytes_per_second = 1.0

    def product(self, tokens: int, width_in: int, width_out: int) -> Times:
        once = 2.0 * tokens * width_in * width_out
        return Times(once, 2 * once, once)

    def attention(self, batch: int, heads: int, key_heads: int, length: int, head_dim: int) -> Times:
        forward = 4.0 * batch * heads * head_dim * length * length / 2  # a causal half of two products
        return Times(forward, 2 * forward)


def planned(folder: Path, *settings: str) -> StepPlan:
    return plan_step(settings_of(write_config(folder / "tiny", num_hidden_layers=3), *settings))


def test_the_work_is_that_of_the_models_flops(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    floor = floor_of(plan, FlopsClock(), "CPU")
    norms = sum(each.numel() for each in plan.model.parameters() if each.ndim == 1)  # they are in no product
    assert floor.microbatch == TOKENS * training_flops_per_token(plan.model_config, plan.num_parameters - norms, 16)
    assert len(floor.forward) == len(floor.backward) == 3
    assert floor.product_flops_per_second == 1.0
    assert floor.to_json()["microbatch_seconds"] == floor.microbatch


def test_layers_with_one_input_are_one_product_and_stored_matrices_are_many(tmp_path: Path) -> None:
    block = planned(tmp_path).model.get_submodule("model.layers.0")
    assert [(each.width_in, each.width_out) for each in products_of(block)] == [(32, 64), (32, 32), (32, 96), (48, 32)]
    thin = planned(tmp_path, "backend.rules=[{match: '*.up_proj', use: lowrank, rank: 4}]").model
    found = [(each.width_in, each.width_out) for each in products_of(thin.get_submodule("model.layers.0"))]
    assert found == [(32, 64), (32, 32), (32, 48), (32, 4), (4, 48), (48, 32)]


def test_a_frozen_weight_has_no_gradient_to_compute(tmp_path: Path) -> None:
    whole, frozen = planned(tmp_path), planned(tmp_path, "lora.r=2")
    head = frozen.model.get_submodule(frozen.model.stages().head)
    assert [each.trained for each in products_of(head)] == [False]
    block = frozen.model.get_submodule("model.layers.0")
    thin = [each for each in products_of(block) if each.trained]
    assert len(thin) == 2 * 7
    assert all(2 in (each.width_in, each.width_out) for each in thin)
    assert floor_of(frozen, FlopsClock(), "CPU").head == pytest.approx(
        floor_of(whole, FlopsClock(), "CPU").head * 2 / 3
    )


@pytest.mark.parametrize(
    ("settings", "bytes_each"),
    [
        ((), 4 + 2 * 4 + 2 * 2 * 4),
        (("model.dtype=bfloat16", "optimizer.moments_dtype=bfloat16", "optimizer.master_weights=none"), 2 * 3 + 4 * 2),
        (("model.dtype=bfloat16",), 2 * 2 + 2 * 4 + 4 * 4),
        (("model.dtype=bfloat16", "optimizer.master_weights=split"), 2 + 2 * 2 + 2 * 2 + 4 * 4),
    ],
)
def test_an_update_reads_and_writes_everything_once(tmp_path: Path, settings: tuple[str, ...], bytes_each: int) -> None:
    plan = planned(tmp_path, *settings)
    assert update_bytes(plan) == plan.num_parameters * bytes_each
    assert floor_of(plan, FlopsClock(), "CPU").update == update_bytes(plan)


def test_a_teachers_forward_is_part_of_the_step(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    taught = dataclasses.replace(plan, teacher_config=plan.model_config)
    alone, floor = floor_of(plan, FlopsClock(), "CPU"), floor_of(taught, FlopsClock(), "CPU")
    assert floor.teacher == pytest.approx(alone.microbatch / 3)
    assert floor.microbatch == pytest.approx(alone.microbatch * 4 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stopwatch_measures_each_shape_once(dtype: torch.dtype) -> None:
    clock = Stopwatch(torch.device("cpu"), dtype)
    product, attention = clock.product(8, 16, 24), clock.attention(2, 4, 2, 8, 16)
    assert 0 < product.of_weight < product.backward
    assert product.forward > 0 < attention.forward
    assert attention.backward > 0
    assert clock.product(8, 16, 24) is product
    assert clock.attention(2, 4, 2, 8, 16) is attention


def test_the_stopwatch_tells_seconds() -> None:
    import time

    clock = Stopwatch(torch.device("cpu"), torch.float32)
    assert 0.004 <= clock.seconds(lambda: time.sleep(0.004)) < 0.4
