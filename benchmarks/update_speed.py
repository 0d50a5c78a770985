"""Speed of the optimizer's part of a step: update regions beside a copy of memory, and whole steps beside adamw's.

    python benchmarks/update_speed.py checkpoint.config_name=tinyllama-1.1b model.max_seq_length=2048 \
        training.batch_size=8 model.dtype=bfloat16 optimizer.moments_dtype=bfloat16 optimizer.master_weights=none

`share`: optimizers whose update regions, all of a model's, are run alone, in turns with a copy. Their bytes are every
input once and what is written once; `of_copy` is bytes per second as a share of the copy's. `whole`: optimizers whose
whole step is timed, with random tokens and without clipping, each in a process of its own, the first of them once more
at the end. Settings are train_llm.py's and those of OWN; `share=none` or `whole=none` leaves a part out.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OWN = {"share": "adamw,sgdm,lion,muon", "whole": "adamw,muon", "rounds": "9", "steps": "5"}
COPIED = {"cuda": 2**31, "cpu": 2**27}  # bytes of the buffer that is copied: far more than a cache holds


def main() -> None:
    own, settings = dict(OWN), []
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            settings.append(argument)
    shares, wholes = ([] if own[part] == "none" else own[part].split(",") for part in ("share", "whole"))
    for name in shares:
        print(json.dumps({"optimizer": name} | share(name, settings, int(own["rounds"]))), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for turn, name in enumerate([*wholes, *wholes[:1]] if len(wholes) > 1 else wholes):
            given = [*settings, f"compile.output_dir={folder}", f"optimizer={name}"]
            result = whole(given, int(own["rounds"]), int(own["steps"]))
            results[name if turn < len(wholes) else f"{name} again"] = result["median_ms"]
            print(json.dumps({"step_of": name} | result), flush=True)
    for name, milliseconds in results.items():
        print(f"step of {name} / {wholes[0]}: {milliseconds / results[wholes[0]]:.3f}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Update regions alone


def share(name: str, settings: list[str], rounds: int) -> dict[str, float]:
    """Compile one optimizer's update regions, run them over all parameters, and compare with a copy."""
    import torch

    from apps.training.config import parse
    from apps.training.step_plan import plan_step
    from compiled import lowering
    from compiled.parallel import lower_all

    plan = plan_step(parse(["command=compile", *settings, f"optimizer={name}"]))
    kind = plan.spec.device["kind"]
    regions, updates = captured_updates(plan, kind)
    with tempfile.TemporaryDirectory() as folder:
        lower_all(regions, kind, Path(folder), None, None, lambda *_: None)
        code = {region: lowering.load(Path(folder, region), kind) for region in regions}
        calls = [(code[region], real_inputs(regions[region], kind)) for region in updates]
        update = replayed(lambda: [run(tensors) for run, tensors in calls], kind)
        source = torch.empty(COPIED[kind], dtype=torch.uint8, device=kind)
        target = torch.empty_like(source)
        copy = replayed(lambda: target.copy_(source), kind)
        times: dict[str, list[float]] = {"update": [], "copy": []}
        for _ in range(rounds):
            times["update"].append(seconds(update, kind))
            times["copy"].append(seconds(copy, kind))
    moved = sum(touched_bytes(regions[region].spec) for region in updates)
    speed = moved / statistics.median(times["update"])
    copied = 2 * source.nbytes / statistics.median(times["copy"])
    return {
        "gigabytes": round(moved / 1e9, 3),
        "median_ms": round(statistics.median(times["update"]) * 1e3, 3),
        "gigabytes_per_s": round(speed / 1e9, 1),
        "copy_gigabytes_per_s": round(copied / 1e9, 1),
        "of_copy": round(speed / copied, 3),
        "kernels": sum(regions[region].spec.kernels for region in updates),
    }


def captured_updates(plan: Any, kind: str) -> tuple[dict[str, Any], list[str]]:
    """The distinct update regions of the planned step, and the one of each block, the head and the embedding."""
    import torch

    from compiled import lowering
    from compiled.capture import Sources
    from compiled.capture_parts import head_stage
    from compiled.groups import add_updates
    from compiled.stages import make_stage

    model, regions = plan.model, {}
    names = model.stages()
    sources = Sources(lowering.fake_mode(), torch.device(kind))
    blocks = [make_stage(model, path) for path in names.blocks]
    embed, head = make_stage(model, names.embed), head_stage(model)
    with lowering.quiet_torch():
        chunks, skips = plan.spec.head_chunks, plan.spec.skips_nonfinite
        updates = add_updates(regions, blocks, embed, head, chunks, plan.optimizers, plan.precision, sources, skips)
    used = [entry["direct"] for entry in updates if entry["direct"]]
    return {name: regions[name] for name in dict.fromkeys(used)}, used


def real_inputs(region: Any, kind: str) -> list[Any]:
    """Small positive numbers of the inputs' shapes and dtypes; squares have to be positive."""
    import torch

    tensors = []
    for fake in region.inputs:
        real = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=kind)
        tensors.append(real.uniform_(0.01, 0.02))
    return tensors


def touched_bytes(spec: Any) -> int:
    """Every input once, and once more what is written."""
    written = set(spec.mutated)
    return sum(entry.bytes * (1 + (entry.name in written)) for entry in spec.inputs)


def replayed(function: Callable[[], Any], kind: str) -> Callable[[], Any]:
    """The function, warm; on a GPU as one CUDA graph, which is how a step runs it."""
    import torch

    for _ in range(3):
        function()
    if kind != "cuda":
        return function
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def seconds(function: Callable[[], Any], kind: str) -> float:
    import torch

    wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - started


# ----------------------------------------------------------------------------------------------------------------------
# Whole steps


def whole(settings: list[str], rounds: int, steps: int) -> dict[str, float]:
    """Compile one optimizer's step if need be, and time it in a process of its own, alone on the device."""
    import torch

    from apps.training.compile_command import compile_artifact
    from apps.training.config import parse
    from apps.training.programs import require_artifact
    from apps.training.step_plan import plan_step
    from backends.errors import UserError
    from benchmarks.step_speed import OURS, Variant

    config = parse(["command=compile", *settings])
    plan = plan_step(config)
    try:
        require_artifact(config, plan)
    except UserError:
        compile_artifact(config, plan)
    on_gpu = plan.spec.device["kind"] == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()  # what this process tried its regions on
    variant = Variant(OURS, settings)
    times = [variant.seconds(steps) * 1e3 for _ in range(rounds)]
    result = {"min_ms": round(min(times), 2), "median_ms": round(statistics.median(times), 2)}
    result |= {"peak_gib": round(variant.peak_gib(), 2)} if on_gpu else {}
    variant.stop()
    return result


if __name__ == "__main__":
    main()
