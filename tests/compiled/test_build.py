"""From a model to an artifact's bytes: what the manifest says, what it costs, and that no weights are inside."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from apps.training.step_plan import StepPlan
from compiled import build as building
from compiled import lowering
from compiled.artifact import open_artifact, read_member
from compiled.build import build, logits_written_over, step_cost
from compiled.capture import Captured
from compiled.regions import RegionSpec
from compiled.schedule import Schedule, capture_step
from tests.compiled.conftest import Compiled

PlanOf = Callable[..., StepPlan]


def test_every_region_of_the_schedule_has_code_graph_and_spec(tiny: Compiled) -> None:
    manifest = tiny.artifact.manifest
    schedule = manifest["schedule"]
    parts = [schedule["embed"], *schedule["blocks"]]
    named = {part[role] for part in parts for role in ("forward", "backward", "evaluate")}
    named |= {schedule["head"]["train"], schedule["head"]["evaluate"]}
    named |= {group[kind] for group in schedule["updates"] for kind in ("direct", "summed")}
    assert named == manifest["regions"].keys()
    members = {f"regions/{name}" for name in named} | {f"graphs/{name}.txt" for name in named}
    assert members == manifest["members"].keys()
    with ZipFile(tiny.artifact.path) as archive:
        assert set(archive.namelist()) == members | {"manifest.json"}
    for name in named:
        assert read_member(tiny.artifact, f"regions/{name}").startswith(b"\x7fELF")
        assert b"def forward(self" in read_member(tiny.artifact, f"graphs/{name}.txt")


def test_the_manifest_describes_what_was_compiled(tiny: Compiled) -> None:
    manifest = tiny.artifact.manifest
    assert manifest["spec"] == tiny.plan.spec.to_json()
    assert manifest["parameters"] == sum(p.numel() for p in tiny.model().parameters())
    assert manifest["optimizer"]["state"] == ["exp_avg", "exp_avg_sq"]
    assert "lr" in manifest["optimizer"]["hyperparameters"]
    assert manifest["compile_seconds"] >= manifest["trace_seconds"] > 0
    for region in tiny.artifact.region_specs().values():
        assert region.kernels >= 1
        assert region.seconds > 0
        assert region.nodes >= 1


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine code of a kilobyte each, so that what else is in an artifact can be seen quickly."""

    def lower_all(
        regions: dict[str, Captured], kind: str, folder: Path, workers: Any, debug: Any, report: Any, *_: Any
    ) -> None:
        for name in regions:
            (folder / name).write_bytes(name.encode().ljust(1024, b"."))

    monkeypatch.setattr(building, "lower_all", lower_all)


@pytest.mark.usefixtures("without_compiler")
def test_artifacts_hold_no_weights(plan_of: PlanOf) -> None:
    """A model 1000 times as large, the same size of file but for the digits of its shapes."""

    def made(**fields: int) -> tuple[int, int]:
        plan = plan_of(**fields)
        content = build(plan.model, plan.spec, plan.optimizers, plan.precision)
        return len(content), sum(parameter.numel() for parameter in plan.model.parameters())

    small, few = made()
    large, many = made(hidden_size=1024, intermediate_size=2048, vocab_size=8000)
    assert many > 1000 * few
    assert abs(large - small) < 0.1 * small
    assert large < many / 50


@pytest.mark.usefixtures("without_compiler")
def test_equal_steps_give_equal_artifacts_but_for_the_time_they_took(plan_of: PlanOf, tmp_path: Path) -> None:
    manifests = []
    for _ in range(2):
        plan = plan_of()
        (tmp_path / "x").write_bytes(build(plan.model, plan.spec, plan.optimizers, plan.precision))
        manifest = open_artifact(tmp_path / "x").manifest
        manifests.append({key: value for key, value in manifest.items() if not key.endswith("_seconds")})
    assert json.dumps(manifests[0]) == json.dumps(manifests[1]).replace(
        plan.spec.model_name, manifests[0]["spec"]["model_name"]
    )


@pytest.mark.usefixtures("without_compiler")
def test_debug_keeps_the_graphs(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of()
    build(plan.model, plan.spec, plan.optimizers, plan.precision, debug=tmp_path / "kept")
    names = {path.name for path in (tmp_path / "kept" / "graphs").iterdir()}
    assert {"embed_forward.txt", "block_0_backward.txt", "head_train.txt", "update_head.txt"} <= names


def costs(plan: StepPlan) -> tuple[dict[str, int], dict[str, RegionSpec], Schedule]:
    regions, schedule = capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)
    specs = {name: captured.spec for name, captured in regions.items()}
    return step_cost(specs, schedule, plan.spec), specs, schedule


def test_flops_are_those_of_a_transformers_step(plan_of: PlanOf) -> None:
    """6 per weight of a product and token, and attention: half of its square, forward and 2.5 times backward."""
    cost, _, _ = costs(plan_of())
    tokens, hidden, inner, layers, vocabulary = 32, 32, 48, 2, 96
    weights = layers * (2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * inner) + hidden * vocabulary
    attention = layers * 2 * (2 * 16 * 16 * hidden * 2) // 2
    assert cost["flops"] == 6 * weights * tokens + attention + attention * 5 // 2


def test_what_is_kept_is_told_for_each_block(plan_of: PlanOf) -> None:
    cost, specs, schedule = costs(plan_of(num_hidden_layers=5))
    assert cost["hidden_bytes"] == 2 * 16 * 32 * 4
    assert cost["saved_bytes"] == [specs[schedule.blocks[0]["forward"]].saved_bytes] * 5


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_heads_memory_is_that_of_a_chunk_of_logits(plan_of: PlanOf, chunks: int, dtype: str) -> None:
    """Also where a chunk has more tokens than the vocabulary has entries."""
    settings = (f"compile.head_chunks={chunks}", f"model.dtype={dtype}", "training.batch_size=20")
    cost, _, _ = costs(plan_of(*settings, vocab_size=70))
    assert cost["head_bytes"] == 3 * (320 // chunks) * 70 * (4 if dtype == "float32" else 8)
    whole, _, _ = costs(plan_of(f"model.dtype={dtype}", "training.batch_size=20", vocab_size=70))
    assert cost["flops"] == whole["flops"]


def test_a_kernel_that_writes_over_the_logits_needs_no_more(plan_of: PlanOf) -> None:
    pytest.importorskip("triton")
    from backends.kernels import cross_entropy

    cross_entropy.register()
    plan = plan_of()
    regions, schedule = capture_step(plan.model, plan.spec, plan.optimizers, plan.precision)
    assert logits_written_over(regions["head_train"]) is None
    graph = torch.fx.Graph()
    logits = graph.placeholder("logits")
    with lowering.fake_mode():
        logits.meta["val"] = torch.empty(7, 50, dtype=torch.bfloat16)
    operator = torch.ops.substrate.cross_entropy_gradient.default
    graph.output(graph.call_function(operator, (logits, logits, logits, None, None)))
    head = regions["head_train"]
    found = logits_written_over(Captured(torch.fx.GraphModule({}, graph), [], head.spec))
    assert found == 7 * 50 * 2
    specs = {name: captured.spec for name, captured in regions.items()}
    assert step_cost(specs, schedule, plan.spec, found)["head_bytes"] == found
