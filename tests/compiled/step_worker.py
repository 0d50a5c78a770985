"""One worker of tests/compiled/test_many_workers.py: its rows' share of a step, through the artifact, over gloo.

python step_worker.py RANK WORLD_SIZE FOLDER     FOLDER/job.json says what to do; results go to FOLDER
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import modelzoo
from apps.training.config import parse
from apps.training.hyperparameters import hyperparameter_table
from apps.training.step_plan import StepPlan, plan_step
from apps.training.workers.reducer import GradientReducer
from backends.lora import Lora, add_lora, lora_layers
from backends.precision import as_torch
from backends.routing import route
from backends.seeding import generator_of
from compiled.artifact import open_artifact
from compiled.program import CompiledProgram
from compiled.reduction import Reducer
from tests import warm_python

STEPS = 3


def whole_batch(plan: StepPlan, rows: int, step: int) -> dict[str, Tensor]:
    """All rows of a step, with random padding; the first quarter counts nowhere. grad_scale is 1 / all counted."""
    generator = torch.Generator().manual_seed(step)
    shape = (rows, plan.spec.max_seq_length)
    mask = torch.rand(shape, generator=generator) < torch.rand(rows, 1, generator=generator)
    mask[: rows // 4] = False
    vocabulary = plan.model_config.vocab_size
    return {
        "input_ids": torch.randint(0, vocabulary, shape, generator=generator),
        "labels": torch.randint(0, vocabulary, shape, generator=generator),
        "grad_scale": mask.to(as_torch(plan.precision.logits)) / int(mask.sum()),
    }


def share(batch: dict[str, Tensor], rank: int, world_size: int, accumulation: int) -> list[dict[str, Tensor]]:
    """The worker's microbatches: consecutive rows, so that the first worker of four has no counted position."""
    chunks = [tensor.chunk(world_size * accumulation) for tensor in batch.values()]
    parts = [dict(zip(batch, tensors, strict=True)) for tensors in zip(*chunks, strict=True)]
    for number, part in enumerate(parts):
        part["first_row"] = torch.tensor(number * len(part["input_ids"]))
    return parts[rank * accumulation : (rank + 1) * accumulation]


def add_random_updates(model: Any, lora: Lora) -> None:
    """Updates with a B that is not zero: every formula shows."""
    add_lora(model, lora.r, lora.alpha, lora.layers, train_norms=lora.train_norms)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            layer.lora_B.normal_(0.0, 0.1, generator=generator_of(1, name))


def build(settings: list[str], artifact: str, reducer: Reducer) -> tuple[StepPlan, Any, CompiledProgram]:
    config = parse(settings)
    plan = plan_step(config)
    model = modelzoo.build_model(plan.model_config, dtype=plan.precision.parameters, seed=1).train()
    route(model, config.backend.rules)
    if plan.lora is not None:
        add_random_updates(model, plan.lora)
    moments = as_torch(plan.precision.moments)
    opened = open_artifact(Path(artifact))
    program = CompiledProgram(opened, model, moments_dtype=moments, master_dtype=None, reducer=reducer, stats_every=1)
    return plan, model, program


def table(plan: StepPlan, model: Any, step: int) -> Tensor:
    seed = 5 if plan.precision.rounding == "stochastic" else None
    names, dtype = [name for name, _ in model.named_parameters()], as_torch(plan.precision.moments)
    return hyperparameter_table(names, plan.groups, step=step, rate=lambda peak: 1e-3, dtype=dtype, rounding_seed=seed)


def run_case(case: dict[str, Any], rank: int, world_size: int) -> dict[str, Any]:
    """Gradients of step 0, then the steps; this worker's view of everything."""
    group = dist.group.WORLD
    sizes = {"rank": rank, "world_size": world_size, "bucket_bytes": case["bucket_bytes"]}
    reducer = GradientReducer(group, shards=case["shards"], **sizes)
    plan, model, program = build(case["settings"], case["artifact"], reducer)

    def microbatches(step: int) -> list[dict[str, Tensor]]:
        rows = plan.spec.batch_size * world_size * case["accumulation"]
        return share(whole_batch(plan, rows, step), rank, world_size, case["accumulation"])

    gradients = program.gradients(microbatches(0))
    numbers = range(1, STEPS + 1)
    steps, statistics, hits = [], [], []
    for step in numbers:
        program.measuring.begin(step)
        steps.append(program.train_step(microbatches(step), table(plan, model, step), case["clip"]))
        statistics.append(program.measuring.table.clone())
        hits.append(program.measuring.accuracy.clone())
    return {
        "gradients": gradients,
        "losses": torch.stack([step.loss for step in steps]),
        "norms": [step.grad_norm for step in steps],
        "statistics": statistics,
        "accuracies": torch.stack(hits),
        "buffers": dict(model.named_buffers()),
        "weights": {name: weight.detach() for name, weight in model.named_parameters()},
        "state": program.optimizer_state(),
    }


def run_job(cases: dict[str, dict[str, Any]], world_size: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Start so many workers, which run every case; what each of them found, by case. Most of it is starting them."""
    (folder / "job.json").write_text(json.dumps(cases))
    command = [warm_python.python(), __file__]
    started = [subprocess.Popen([*command, str(rank), str(world_size), folder]) for rank in range(world_size)]
    assert [worker.wait(timeout=300) for worker in started] == [0] * world_size
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(world_size)] for name in cases}


def main(rank: int, world_size: int, folder: Path) -> None:
    cases = json.loads((folder / "job.json").read_text())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for name, case in cases.items():
        torch.save(run_case(case, rank, world_size), folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
