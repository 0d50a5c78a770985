"""A train step and generation with low-rank block linears beside dense ones, and how their FLOPs compare.

    python benchmarks/low_rank_speed.py keep=0.5 checkpoint.config_name=tinyllama-1.1b training.batch_size=8 \
        model.max_seq_length=2048 model.dtype=bfloat16 optimizer.moments_dtype=bfloat16 optimizer.master_weights=none
    python benchmarks/low_rank_speed.py keep=0.5 steps=3 prompt=32 new_tokens=8 checkpoint.config_name=demo \
        training.batch_size=2 model.max_seq_length=64

Settings are train_llm.py's, and those of OWN. Random weights and tokens: the two models compile their steps, then take
`steps` steps in turns. Generation is greedy, from a key-value cache of fixed size: `batches` prompts of `prompt` tokens
at a time, read kernel by kernel, then `new_tokens` each, replayed as one recording on a GPU; the two are told apart. A
JSON line for each model, and one of ratios: `gain` is dense seconds by low-rank seconds, `of_flops` that gain by the
ratio of FLOPs (1: all that was saved).
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OWN = {"keep": "0.5", "steps": "15", "batches": "1,64", "prompt": "512", "new_tokens": "64"}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    own = {name: given.pop(name, default) for name, default in OWN.items()}
    rule = [{"match": "*_proj", "use": "lowrank", "keep": float(own["keep"])}]
    found = measure({"dense": [], "low rank": rule}, given, own)
    for name, line in found.items():
        print(json.dumps({"model": name} | line), flush=True)
    dense, low = found.values()
    ratios: dict[str, Any] = {"flops": round(dense["step_flops"] / low["step_flops"], 3)}
    for key in dense:
        if key.endswith("_ms"):
            gain = dense[key] / low[key]
            of = (
                dense["step_flops"] / low["step_flops"]
                if key == "step_ms"
                else dense["block_numbers"] / low["block_numbers"]
            )
            ratios[key.removesuffix("_ms")] = {"gain": round(gain, 3), "of_flops": round(gain / of, 3)}
    print(json.dumps({"ratios": ratios}), flush=True)


def measure(variants: dict[str, list[dict[str, Any]]], given: dict[str, str], own: dict[str, str]) -> dict[str, Any]:
    """Figures of each variant: backend rules by name."""
    import torch

    from apps.training.config import parse
    from apps.training.devices import open_device, wait
    from apps.training.programs import make_program
    from apps.training.random_step import first_hyperparameters, random_batch
    from apps.training.step_plan import plan_step
    from apps.training.workers.group import Workers

    found: dict[str, Any] = {}
    steps: dict[str, Callable[[], None]] = {}
    models = {}
    for name, rules in variants.items():
        config = parse(["command=run", *(f"{k}={v}" for k, v in given.items()), f"backend.rules={json.dumps(rules)}"])
        plan = plan_step(config)
        artifact = artifact_of(config, plan)
        device = open_device(plan.spec.device["kind"], config, Workers.solo())
        model = models[name] = random_model(plan, config, device)
        program, data = make_program(config, plan, artifact, model, Workers.solo()), random_batch(plan, device)
        table = first_hyperparameters(plan, model, device)
        steps[name] = lambda program=program, data=data, table=table: program.train_step([data], table, None)
        blocks = [each.numel() for path, each in model.named_parameters() if "_proj." in path]
        found[name] = {"step_flops": artifact.manifest["cost"]["flops"], "block_numbers": sum(blocks)}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(3 + int(own["steps"])):
        for name, step in steps.items():
            times[name].append(seconds_of(step, lambda: wait(device)))
    for name, each in times.items():
        found[name]["step_ms"] = round(1e3 * statistics.median(each[3:]), 2)
    with torch.no_grad():
        for size in map(int, own["batches"].split(",")):
            for _ in range(2):  # the first of each warms up
                for name, model in models.items():
                    found[name] |= generation(model.eval(), size, int(own["prompt"]), int(own["new_tokens"]))
    return found


def artifact_of(config: Any, plan: Any) -> Any:
    """The compiled step, made now where there is none yet."""
    from apps.training.compile_command import compile_artifact
    from compiled.artifact import Artifact, find

    known = find(Path(config.compile.output_dir), plan.spec)
    return known if isinstance(known, Artifact) else compile_artifact(config, plan)


def random_model(plan: Any, config: Any, device: Any) -> Any:
    """The routed model with random parameters: no matrix is decomposed for a measurement of time."""
    import torch

    import modelzoo
    from backends.routing import route
    from modelzoo.build import finish, put_parameter

    model = modelzoo.build_meta(plan.model_config, dtype=config.model.dtype)
    route(model, config.backend.rules, config.backend.default)
    for name, each in list(model.named_parameters()):
        shape = tuple(each.shape)
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02
        put_parameter(model, name, values.to(device, each.dtype))
    finish(model)
    return model


def generation(model: Any, size: int, prompt: int, new_tokens: int) -> dict[str, float]:
    """Milliseconds of reading the prompts, and of one further token for all of them."""
    import torch

    from apps.training.devices import wait

    device = next(model.parameters()).device
    ids = torch.randint(0, model.config.vocab_size, (size, prompt), device=device)

    def seconds(count: int) -> float:
        return seconds_of(
            lambda: model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                cache_implementation="static",
            ),
            lambda: wait(device),
        )

    first, whole = seconds(1), seconds(1 + new_tokens)
    token = max(whole - first, 0.0) / new_tokens
    return {f"prompt_{size}x{prompt}_ms": round(1e3 * first, 2), f"token_{size}_ms": round(1e3 * token, 3)}


def seconds_of(work: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
