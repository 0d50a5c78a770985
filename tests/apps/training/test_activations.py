"""What blocks keep, as chosen by memory."""

from pathlib import Path

import pytest

from apps.training import activations
from apps.training.activations import FILLED, ONE_IN, block_activations, kept_activations
from apps.training.step_plan import plan_step
from compiled.schedule import capture_step
from tests.apps.training.plans import settings_of, write_config

GIB = 2**30


@pytest.mark.parametrize("asked", ["all", "dear"])
def test_what_was_asked_for_is_taken(asked: str) -> None:
    assert kept_activations(asked, memory=1, rest=GIB, block=GIB, layers=8) == asked
    assert kept_activations(asked, memory=None, rest=0, block=0, layers=8) == asked


def test_auto_gives_up_cheap_activations_where_many_blocks_would_be_computed_again() -> None:
    layers, rest = 40, 10 * GIB
    fits = (rest + layers * GIB) / FILLED
    assert kept_activations("auto", memory=int(fits) + 1, rest=rest, block=GIB, layers=layers) == "all"
    few = int(fits - (layers / ONE_IN - 0.1) * GIB / FILLED)
    assert kept_activations("auto", memory=few, rest=rest, block=GIB, layers=layers) == "all"
    many = int(fits - (layers / ONE_IN + 0.1) * GIB / FILLED)
    assert kept_activations("auto", memory=many, rest=rest, block=GIB, layers=layers) == "dear"
    assert kept_activations("auto", memory=None, rest=rest, block=GIB, layers=layers) == "all"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_block_is_expected_to_keep_what_it_keeps(tmp_path: Path, dtype: str) -> None:
    folder = write_config(tmp_path / "wide", hidden_size=128, intermediate_size=352, num_key_value_heads=2)
    plan = plan_step(settings_of(folder, f"model.dtype={dtype}", "compile.arch=cpu", "training.batch_size=2"))
    regions, schedule = capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)
    forward = regions[schedule.blocks[0]["forward"]].spec
    tokens = plan.spec.batch_size * plan.spec.max_seq_length
    found = forward.saved_bytes + forward.outputs[0].bytes  # the next block's input, which the block before keeps too
    assert block_activations(plan.model_config, plan.precision, tokens) == pytest.approx(found, rel=0.15)


def test_llama_2_7b_on_a_gpu_of_140_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 × 4096 tokens it has to give up something, of 4 × 4096 nothing."""
    monkeypatch.setattr(activations, "device_memory", lambda kind: 140 * GIB)
    settings = ["model.dtype=bfloat16", "optimizer.moments_dtype=bfloat16", "optimizer.master_weights=none"]
    settings += ["model.max_seq_length=4096", "compile.arch=cpu"]
    kept = {
        (rows, asked): plan_step(
            settings_of("llama-2-7b", *settings, f"training.batch_size={rows}", f"compile.activations={asked}")
        ).spec.activations
        for rows in (4, 8)
        for asked in ("auto", "all")
    }
    assert kept == {(4, "auto"): "all", (8, "auto"): "dear", (4, "all"): "all", (8, "all"): "all"}
