"""Time of a train step: the compiled step against what a user would take instead, and against the floor.

    python benchmarks/step_speed.py checkpoint.config_name=clm-60m model.max_seq_length=2048 training.batch_size=16 \
        model.dtype=bfloat16 optimizer.moments_dtype=bfloat16 optimizer.master_weights=none peers=none

Random tokens, no clipping, AdamW. Each variant is a process of its own, set up as its user would have it (our runs
also set the memory allocator). On a GPU each is alone there, one after the other; on a CPU they take turns, `steps`
rounds of them, so that a busy moment of the machine meets all. A line of JSON for each gives minimum and median time of
a step, MFU and share of the floor where they are known, peak memory, and how many times as long as ours it takes; or
why it was left out. `peers`: of eager, compile and liger (benchmarks/peers.py), or none. Without the CUDA graph:
run.cuda_graph=off. training.gradient_accumulation_steps counts. `checkpoint.config_name` may be a folder.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.peers import NAMES, Missing, peer_step  # noqa: E402

OWN = {"peers": "eager,compile", "steps": "12"}
OURS = "substrate"
NO_ROOM = "does not fit into the device's memory"
MEASURED = 0.3  # seconds that a measurement on a GPU takes at least: whole steps, one after the other


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    own = {name: given.pop(name, default) for name, default in OWN.items()}
    peers = [] if own["peers"] == "none" else own["peers"].split(",")
    unknown = sorted(set(peers) - set(NAMES))
    if unknown:
        sys.exit(f"error: peers={own['peers']}: {unknown[0]} is unknown. Expected some of {', '.join(NAMES)}, or none.")
    from apps.training.compile_command import compile_artifact, region_table, summary
    from apps.training.config import parse
    from apps.training.step_plan import plan_step

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"compile.output_dir={folder}", *(f"{key}={value}" for key, value in given.items())]
        config = parse(["command=compile", *settings])
        plan = plan_step(config)
        artifact = compile_artifact(config, plan)
        print(summary(artifact, plan) + "\n" + region_table(artifact), flush=True)
        on_gpu = plan.spec.device["kind"] == "cuda"
        measure = one_by_one if on_gpu else in_turns
        yardstick = yardstick_of(config, plan, artifact)
        ours = None
        tokens = accumulation_of(config) * plan.spec.batch_size * plan.spec.max_seq_length
        for result in measure([OURS, *peers], settings, int(own["steps"])):
            ours = result if result.name == OURS else ours
            print(json.dumps(line(result, ours, yardstick, tokens)), flush=True)
        print(json.dumps(floor_line(yardstick, tokens)), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Variants, each a process


@dataclass
class Result:
    """What became of a variant: seconds of its steps and its peak memory in GiB, or why it was left out."""

    name: str
    seconds: list[float]
    peak_gib: float | None = None
    left_out: str | None = None


class LeftOut(Exception):
    """The variant cannot run here; says why."""


class Variant:
    """A variant in a process of its own, warm. Raises LeftOut when it is not installed or does not fit."""

    def __init__(self, name: str, settings: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, settings, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = "failed, see above"
        if isinstance(answer, str):
            self.stop()
            raise LeftOut(answer)

    def seconds(self, steps: int) -> float:
        """Mean seconds of so many steps, one after the other."""
        return self._ask(steps)

    def peak_gib(self) -> float:
        """The most of the GPU's memory that PyTorch held."""
        return self._ask("memory")

    def stop(self) -> None:
        """End the process, which gives its memory back."""
        self._pipe.close()
        self._process.join()

    def _ask(self, what: int | str) -> float:
        self._pipe.send(what)
        return self._pipe.recv()


def one_by_one(names: Sequence[str], settings: list[str], rounds: int) -> Iterable[Result]:
    """Each variant alone on the GPU."""
    import torch

    torch.cuda.empty_cache()  # what the compile tried its kernels on
    for name in names:
        try:
            variant = Variant(name, settings)
        except LeftOut as reason:
            yield Result(name, [], left_out=str(reason))
            continue
        repeats = max(1, int(MEASURED / variant.seconds(1)))
        times = [variant.seconds(repeats) for _ in range(rounds)]
        yield Result(name, times, variant.peak_gib())
        variant.stop()


def in_turns(names: Sequence[str], settings: list[str], rounds: int) -> Iterable[Result]:
    """A step of each variant in every round."""
    results, variants = {name: Result(name, []) for name in names}, {}
    for name in names:
        try:
            variants[name] = Variant(name, settings)
        except LeftOut as reason:
            results[name].left_out = str(reason)
    for _ in range(rounds):
        for name, variant in variants.items():
            results[name].seconds.append(variant.seconds(1))
    for variant in variants.values():
        variant.stop()
    return results.values()


def serve(name: str, settings: list[str], pipe: Any) -> None:
    """A variant's process: says 0.0 when it is warm or else why it is left out, then answers as `Variant` asks."""
    import torch

    from apps.training.config import parse
    from apps.training.devices import open_device, wait
    from apps.training.step_plan import plan_step
    from apps.training.workers.group import Workers

    config = parse(["command=run", *settings])
    plan = plan_step(config)
    kind = plan.spec.device["kind"]
    try:
        if name == OURS:
            device = open_device(kind, config, Workers.solo())
            step = own_step(config, plan, device)
        else:
            device = torch.device(kind)
            recomputes = needs_recomputing(config, plan, device)
            step = peer_step(name, plan, device, recomputes=recomputes, accumulation=accumulation_of(config))
        for _ in range(3):
            step()
        wait(device)
    except Missing as reason:
        return pipe.send(str(reason))
    except torch.OutOfMemoryError:
        return pipe.send(NO_ROOM)
    except Exception as error:
        if name == OURS:
            raise
        return pipe.send(f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}")
    pipe.send(0.0)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:  # the benchmark is over
            return None
        if asked == "memory":
            pipe.send(torch.cuda.max_memory_allocated() / 2**30)
            continue
        wait(device)
        started = time.perf_counter()
        for _ in range(asked):
            step()
        wait(device)
        pipe.send((time.perf_counter() - started) / asked)


def needs_recomputing(config: Any, plan: Any, device: Any) -> bool:
    """Whether plain autograd is told to, or could not keep its activations on this device."""
    from apps.training.memory import available_memory
    from apps.training.programs import run_memory

    free = available_memory(str(device), at_most_gib=config.run.memory_gib)
    needed = run_memory(config, plan, None, accumulation=accumulation_of(config), world_size=1, free=free)
    return config.run.recompute == "block" or (config.run.recompute == "auto" and needed.total > free)


def accumulation_of(config: Any) -> int:
    """Microbatches of a step."""
    from apps.training.steps import accumulation_steps

    return accumulation_steps(config.training, 1)


def own_step(config: Any, plan: Any, device: Any) -> Callable[[], object]:
    """Load the artifact as a run does and return its step; prints how long loading and the first step took."""
    from apps.training.devices import wait
    from apps.training.models import load_weights
    from apps.training.programs import blocks_to_recompute, make_program, require_artifact
    from apps.training.random_step import first_hyperparameters, random_batch
    from apps.training.workers.group import Workers

    artifact, accumulation = require_artifact(config, plan), accumulation_of(config)
    recomputed = blocks_to_recompute(config, plan, artifact, device, accumulation=accumulation)
    model = load_weights(config, plan.model_config, device)
    batches = [random_batch(plan, device, accumulation) for _ in range(accumulation)]
    table = first_hyperparameters(plan, model, device)
    wait(device)
    started = time.perf_counter()
    program = make_program(config, plan, artifact, model, Workers.solo(), recomputed=recomputed)
    loaded = time.perf_counter()
    loss = program.train_step(batches, table, None).loss.item()
    taken = {
        "recomputed_blocks": recomputed,
        "load_s": round(loaded - started, 3),
        "first_step_s": round(time.perf_counter() - loaded, 3),
    }
    print(json.dumps(taken | {"loss": loss}), flush=True)
    return lambda: program.train_step(batches, table, None)


# ----------------------------------------------------------------------------------------------------------------------
# What is said of them


def yardstick_of(config: Any, plan: Any, artifact: Any) -> Any:
    """FLOPs, peak and floor of the step; a CPU's floor is measured here, since its artifact has none."""
    from dataclasses import replace

    import torch

    from apps.training.efficiency import efficiency_of
    from apps.training.floor import measure_floor
    from apps.training.workers.group import Workers

    device = torch.device(plan.spec.device["kind"], 0) if plan.spec.device["kind"] == "cuda" else torch.device("cpu")
    accumulation = accumulation_of(config)
    found = efficiency_of(config, plan, artifact, device, Workers.solo(), accumulation)
    floor = measure_floor(plan, device) if device.type == "cpu" else None
    return found if floor is None else replace(found, floor=accumulation * floor.microbatch + floor.update)


def line(result: Result, ours: Result | None, yardstick: Any, tokens: int) -> dict[str, Any]:
    """One variant's figures, with the median of the ratios of each round."""
    if result.left_out is not None:
        return {"variant": result.name, "left_out": result.left_out}
    middle = statistics.median(result.seconds)
    found = {"variant": result.name, "min_ms": round(min(result.seconds) * 1e3, 2)} | speed(middle, yardstick, tokens)
    if ours is not None and ours is not result and ours.seconds:
        ratios = [theirs / mine for theirs, mine in zip(result.seconds, ours.seconds, strict=True)]
        found |= {"times_ours": round(statistics.median(ratios), 3)}
    return found | ({} if result.peak_gib is None else {"peak_gib": round(result.peak_gib, 2)})


def floor_line(yardstick: Any, tokens: int) -> dict[str, Any]:
    if yardstick.floor is None:
        return {"variant": "floor", "left_out": NO_ROOM}
    return {"variant": "floor"} | speed(yardstick.floor, yardstick, tokens)


def speed(seconds: float, yardstick: Any, tokens: int) -> dict[str, float]:
    """Speed of a step of so many tokens that takes so long, and its shares of peak and floor where they are known."""
    found = {"median_ms": round(seconds * 1e3, 2), "tokens_per_s": round(tokens / seconds)}
    found |= {"tflops": round(yardstick.flops / seconds / 1e12, 3)}
    return found | {name: round(share, 4) for name, share in yardstick.shares(seconds).items()}


if __name__ == "__main__":
    main()
