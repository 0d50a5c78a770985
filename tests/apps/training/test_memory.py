"""The memory check: its arithmetic, what it reads of the system, and the line a user sees."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from apps.training import memory
from apps.training.memory import (
    GIB,
    MemoryEstimate,
    available_memory,
    eager_activations,
    estimate,
    of_one_worker,
    require_memory,
    with_snapshot,
)
from backends.errors import UserError
from backends.precision import resolve


def test_the_parts_follow_the_precision_policy() -> None:
    needed = estimate(1000, resolve("bfloat16"), state_tensors=2, activations=7, wide_gradients=False)
    assert needed == MemoryEstimate(parameters=2000, masters=4000, moments=8000, gradients=2000, activations=7)
    assert needed.total == 16007
    halves = estimate(1000, resolve("bfloat16", master="split"), state_tensors=2, activations=7, wide_gradients=False)
    assert halves == replace(needed, masters=2000)
    wide = estimate(1000, resolve("bfloat16", master="none"), state_tensors=1, activations=0, wide_gradients=True)
    assert wide == MemoryEstimate(parameters=2000, masters=0, moments=4000, gradients=4000, activations=0)


def test_workers_sum_in_float32_and_share_masters_and_moments_if_told() -> None:
    whole = estimate(1000, resolve("bfloat16"), state_tensors=2, activations=7, wide_gradients=False)
    assert of_one_worker(whole, 1000, 1, shards=True) == whole
    assert of_one_worker(whole, 1000, 4, shards=False) == replace(whole, gradients=4000)
    assert of_one_worker(whole, 1000, 4, shards=True) == replace(whole, gradients=4000, masters=1000, moments=2000)


def test_a_checkpoint_being_written_is_a_copy_of_this_workers_share() -> None:
    whole = estimate(1000, resolve("bfloat16"), state_tensors=2, activations=7, wide_gradients=False)
    assert with_snapshot(whole, 1, shards=False).snapshot == 2000 + 4000 + 8000
    assert with_snapshot(whole, 4, shards=False).snapshot == (2000 + 4000 + 8000) // 4
    own = of_one_worker(whole, 1000, 4, shards=True)
    assert with_snapshot(own, 4, shards=True).snapshot == 500 + 1000 + 2000
    assert with_snapshot(whole, 1, shards=False).total == whole.total + 14000


def test_eager_activations_grow_with_the_batch_and_hold_the_logits() -> None:
    config = SimpleNamespace(
        num_attention_heads=2, head_dim=4, hidden_size=8, intermediate_size=16, num_hidden_layers=3, vocab_size=100
    )
    one = eager_activations(config, resolve("float32"), batch_size=1, seq_length=10)
    assert one >= 10 * 100 * 4
    assert eager_activations(config, resolve("float32"), batch_size=4, seq_length=10) == 4 * one
    assert eager_activations(config, resolve("bfloat16"), batch_size=1, seq_length=10) < one


def test_a_run_that_does_not_fit_is_one_line_with_numbers_and_what_to_lower() -> None:
    weights = MemoryEstimate(parameters=40 * GIB, masters=0, moments=80 * GIB, gradients=40 * GIB, activations=GIB)
    with pytest.raises(UserError) as error:
        require_memory(weights, 20 * GIB, "cpu")
    line = str(error.value)
    assert "needs about 161.0 GiB (parameters 40.0 GiB, moments 80.0 GiB" in line
    assert "cpu has 20.0 GiB free. Choose a smaller model" in line
    assert "\n" not in line
    batch = MemoryEstimate(parameters=GIB, masters=0, moments=2 * GIB, gradients=GIB, activations=30 * GIB)
    with pytest.raises(UserError, match=r"Lower training\.batch_size"):
        require_memory(batch, 20 * GIB, "cpu")
    require_memory(batch, 34 * GIB, "cpu")


def test_the_tightest_control_group_counts_and_page_cache_is_free(tmp_path: Path) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "self").write_text("0::/outer/inner\n")
    (outer / "memory.max").write_text("1000\n")
    (outer / "memory.current").write_text("700\n")
    (outer / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("600\n")
    assert memory._cgroup_memory(tmp_path, tmp_path / "self") == 500


def test_the_older_layout_of_control_groups_is_read_too(tmp_path: Path) -> None:
    group = tmp_path / "memory" / "job"
    group.mkdir(parents=True)
    (tmp_path / "self").write_text("5:cpu,cpuacct:/x\n4:memory:/job\n")
    (group / "memory.limit_in_bytes").write_text("1000\n")
    (group / "memory.usage_in_bytes").write_text("400\n")
    assert memory._cgroup_memory(tmp_path, tmp_path / "self") == 600


def test_meminfo_says_what_the_host_can_give(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    assert memory._host_memory(tmp_path / "meminfo") == 64 * 1024


def test_this_machine_has_memory() -> None:
    assert 0 < available_memory("cpu") < 2**60
