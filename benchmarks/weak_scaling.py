"""Time of a step on 1, 2, … workers with the same work for each, and what a checkpoint costs.

    python apps/train_llm.py command=compile SETTINGS
    torchrun --nproc-per-node N benchmarks/weak_scaling.py SETTINGS [steps=40] [save=1]

Random tokens, AdamW, no clipping, the CUDA graph on a GPU. The first worker prints one JSON line: the slowest worker's
time of a step (the median of four quarters of `steps`, in each of which the host runs ahead, as in training), the
tokens of all per second, and `waiting_ms`, the median of single steps that the host waits for. `save=1` adds, for one
of the steps, a checkpoint that is written meanwhile, and prints how much of a step it took. How sums and regions
overlap: apps/profile_step.py, started the same way.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OWN = {"steps": "40", "save": "0"}
WAITING = 10


def main() -> None:
    from apps.training.config import parse
    from apps.training.step_plan import plan_step
    from apps.training.workers.group import open_workers
    from apps.training.workers.launch import find_launch, own_gpu

    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    own = {name: given.pop(name, default) for name, default in OWN.items()}
    config = parse(["command=run", *(f"{key}={value}" for key, value in given.items())])
    launch = own_gpu(find_launch())
    plan = plan_step(config)
    with open_workers(launch, device_type=plan.spec.device["kind"], timeout=120) as workers:
        measure(config, plan, workers, own)


def measure(config, plan, workers, own: dict[str, str]) -> None:
    from apps.training.devices import open_device, wait
    from apps.training.models import load_weights
    from apps.training.programs import blocks_to_recompute, make_program, require_artifact
    from apps.training.random_step import first_hyperparameters, random_batch

    began = time.perf_counter()
    device = open_device(plan.spec.device["kind"], config, workers)
    artifact = require_artifact(config, plan)
    recomputed = blocks_to_recompute(config, plan, artifact, device, workers)
    model = load_weights(config, plan.model_config, device)
    program = make_program(config, plan, artifact, model, workers, recomputed=recomputed)
    data, table = random_batch(plan, device), first_hyperparameters(plan, model, device)
    data["grad_scale"] /= workers.world_size

    def steps(count: int, after_third: Callable[[], None] = lambda: None) -> float:
        """Seconds of `count` steps. As in training, the host runs ahead of the device."""
        wait(device)
        began = time.perf_counter()
        for index in range(count):
            program.train_step([data], table, None)
            if index == 2:
                after_third()
        wait(device)
        return time.perf_counter() - began

    times = [steps(1) for _ in range(3 + WAITING)]
    quarter = max(1, int(own["steps"]) // 4)
    quarters = [steps(quarter) for _ in range(4)]
    middle = slowest(statistics.median(quarters) / quarter, workers, device)
    waiting = slowest(statistics.median(times[3:]), workers, device)
    tokens = plan.spec.batch_size * plan.spec.max_seq_length * workers.world_size
    line = {"workers": workers.world_size, "ms": round(middle * 1e3, 2), "tokens_per_s": round(tokens / middle)}
    line["waiting_ms"] = round(waiting * 1e3, 2)
    line |= {"start_and_first_step_s": round(times[0] + time.perf_counter() - began - sum(times) - sum(quarters), 2)}
    if int(own["save"]):
        line |= saving(program, model, workers, steps, middle)
    if workers.is_first:
        print(json.dumps(line), flush=True)


def slowest(seconds: float, workers, device) -> float:
    """The longest of all workers' times."""
    import torch
    import torch.distributed as dist

    value = torch.tensor([seconds], dtype=torch.float64, device=device)
    if workers.device_group is not None:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=workers.device_group)
    return float(value)


def saving(program, model, workers, steps: Callable[..., float], usual: float) -> dict[str, float]:
    """What `count` steps with one checkpoint in them take beyond as many without; it is written while they run."""
    from apps.training.checkpointing.writer import CheckpointWriter

    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(
            Path(workers.broadcast_text(folder)), rank=workers.rank, world_size=workers.world_size
        )

        def save(number: int) -> None:
            writer.snapshot(number, model, program)
            writer.write({}, [], [])

        lost, count = [], 10 + int(3 / usual)  # some three seconds, so that the whole of the writing lies in them
        for number in range(1, 6):  # the first one also allocates what the others take over
            taken = steps(count, after_third=partial(save, number))
            began = time.perf_counter()
            writer.wait()
            waited = time.perf_counter() - began
            lost.append((taken - steps(count)) / usual)
        workers.barrier()
    middle = statistics.median(lost[1:])
    return {"save_lost_steps": round(middle, 3), "first": round(lost[0], 3), "then_waited_s": round(waited, 2)}


if __name__ == "__main__":
    main()
