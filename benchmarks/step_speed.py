"""Time of a train step: compiled regions against what a user would take instead, side by side.

    python benchmarks/step_speed.py checkpoint.config_name=clm-60m model.max_seq_length=2048 training.batch_size=16 \
        model.dtype=bfloat16 optimizer.moments_dtype=bfloat16 optimizer.master_weights=none peers=none

Random tokens, no clipping, AdamW. Each variant is a process of its own, set up as its user would have it (our runs
also set the memory allocator); they take turns, `steps` rounds of them, so that a busy moment of the machine meets all.
A line for each gives the minimum and median time of a step, and one for each peer the ratios. Peers are plain
transformers with fused AdamW: `eager`, and `compile` for torch.compile. `checkpoint.config_name` may be a folder.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OWN = {"peers": "eager,compile", "steps": "12", "graph": "auto"}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    own = {name: given.pop(name, default) for name, default in OWN.items()}
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
        names = ["regions"] + ["regions+graph"] * (on_gpu and own["graph"] != "off")
        names += [peer for peer in own["peers"].split(",") if peer != "none"]
        variants = {name: start(name, settings) for name in names}
        report(variants, int(own["steps"]), plan, artifact.manifest["cost"]["flops"], repeats=5 if on_gpu else 1)


def start(name: str, settings: list[str]) -> Callable[[str], float]:
    """Start a variant and wait until it is warm; returns a function that lets it work and gives what it answers."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=serve, args=(name, settings, theirs), daemon=True).start()
    theirs.close()

    def ask(what: str) -> float:
        ours.send(what)
        return ours.recv()

    ask("1")
    return ask


def serve(name: str, settings: list[str], pipe) -> None:
    """One variant's process: answers a number of steps with their mean seconds, and `memory` with its peak in GiB."""
    import torch

    from apps.training.config import parse
    from apps.training.devices import open_device
    from apps.training.models import load_weights
    from apps.training.programs import require_artifact
    from apps.training.step_plan import plan_step
    from apps.training.workers.group import Workers

    config = parse(["command=run", *settings])
    plan = plan_step(config)
    dtype = getattr(torch, config.model.dtype)
    if name.startswith("regions"):
        device = open_device(plan.spec.device["kind"], config, Workers.solo())
        model = load_weights(config, plan.model_config, device)
        step = regions_step(require_artifact(config, plan), plan, model, "on" if name.endswith("graph") else "off")
    else:
        device = torch.device(plan.spec.device["kind"])
        step = peer_step(plan, device, dtype, compiled=name == "compile")
    for _ in range(3):
        step()
    while True:
        try:
            asked = pipe.recv()
        except EOFError:  # the benchmark is over
            return
        if asked == "memory":
            pipe.send(torch.cuda.max_memory_allocated() / 2**30)
            continue
        synchronize(device)
        started = time.perf_counter()
        for _ in range(int(asked)):
            step()
        synchronize(device)
        pipe.send((time.perf_counter() - started) / int(asked))


def batch(plan, device):
    """Random tokens; every position counts."""
    import torch

    shape = (plan.spec.batch_size, plan.spec.max_seq_length)
    ids = torch.randint(0, plan.model_config.vocab_size, shape, device=device)
    labels = torch.randint(0, plan.model_config.vocab_size, shape, device=device)
    scale = torch.full(shape, 1 / ids.numel(), device=device, dtype=getattr(torch, plan.precision.logits))
    return {"input_ids": ids, "labels": labels, "grad_scale": scale}


def hyperparameters(plan, model, device):
    """The table of numbers for a first step at rate 1e-4."""
    from apps.training.hyperparameters import hyperparameter_table
    from backends.precision import as_torch, at_least_float32

    names, dtype = [name for name, _ in model.named_parameters()], as_torch(at_least_float32(plan.precision.parameters))
    return hyperparameter_table(names, plan.groups, step=1, rate=lambda peak: 1e-4, dtype=dtype).to(device)


def regions_step(artifact, plan, model, graph: str) -> Callable[[], None]:
    """Load the artifact and return its step; prints how long loading and the first step took."""
    import torch

    from compiled.cuda_graph import GraphedProgram
    from compiled.program import CompiledProgram

    device = next(model.parameters()).device
    data = batch(plan, device)
    hyper = hyperparameters(plan, model, device)
    synchronize(device)
    started = time.perf_counter()
    program = (GraphedProgram if graph == "on" else CompiledProgram)(
        artifact,
        model,
        moments_dtype=getattr(torch, plan.precision.moments),
        master_dtype=None if plan.precision.master == "none" else getattr(torch, plan.precision.master),
    )
    loaded = time.perf_counter()
    loss = program.train_step([data], hyper, None).loss.item()
    print(
        json.dumps(
            {"load_s": round(loaded - started, 3), "first_step_s": round(time.perf_counter() - loaded, 3), "loss": loss}
        ),
        flush=True,
    )
    return lambda: program.train_step([data], hyper, None)


def peer_step(plan, device, dtype, *, compiled: bool) -> Callable[[], None]:
    """Plain transformers with fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**plan.spec.model)
    config._attn_implementation, config.use_cache = "sdpa", False
    torch.set_default_dtype(dtype)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model
    data = batch(plan, device)

    def step() -> None:
        forward(input_ids=data["input_ids"], labels=data["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def synchronize(device) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def report(variants: dict[str, Callable[[str], float]], steps: int, plan, flops: int, repeats: int) -> None:
    """Time the variants in turns, print times and ratios."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(steps):
        for name, ask in variants.items():
            times[name].append(ask(str(repeats)))
    tokens = plan.spec.batch_size * plan.spec.max_seq_length
    for name, seconds in times.items():
        low, middle = min(seconds), statistics.median(seconds)
        line = {"variant": name, "min_ms": round(low * 1e3, 2), "median_ms": round(middle * 1e3, 2)}
        line |= {"tokens_per_s": round(tokens / middle), "tflops": round(flops / middle / 1e12, 2)}
        if plan.spec.device["kind"] == "cuda":
            line["peak_gib"] = round(variants[name]("memory"), 2)
        print(json.dumps(line), flush=True)
    ours = times["regions"]
    for name, seconds in times.items():
        if name != "regions":
            ratios = [theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]
            pairs = statistics.median(ratios)
            print(
                f"{name} / regions: {min(seconds) / min(ours):.3f} (minima), {pairs:.3f} (median of pairs)", flush=True
            )


if __name__ == "__main__":
    main()
