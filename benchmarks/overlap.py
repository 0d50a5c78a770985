"""A picture of one step of two workers on CPUs: the regions of the first, and the gradients on their way meanwhile.

    python apps/train_llm.py command=compile compile.arch=cpu SETTINGS
    mpirun -np 2 python benchmarks/overlap.py compile.arch=cpu SETTINGS run.num_threads=1 [picture=docs/overlap.png]

Random tokens, no clipping. Regions are timed around their calls; a sum from the moment its bucket is sent until gloo
reports that it is done. Prints the share of the time of sums that lies under regions, and how long the last one lies
bare behind the last backward.
"""

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Span = tuple[str, float, float]  # name, begin, end in seconds


def main() -> None:
    from apps.training.config import parse
    from apps.training.step_plan import plan_step
    from apps.training.workers.group import open_workers
    from apps.training.workers.launch import find_launch

    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    picture = Path(given.pop("picture", "docs/overlap.png"))
    config = parse(["command=run", *(f"{key}={value}" for key, value in given.items())])
    plan = plan_step(config)
    with open_workers(find_launch(), device_type="cpu", timeout=120) as workers:
        regions, sums = watch_a_step(config, plan, workers)
        if workers.is_first:
            print(json.dumps({"step_ms": round((regions[-1][2] - regions[0][1]) * 1e3, 1)} | hidden(regions, sums)))
            draw(regions, sums, picture)


def watch_a_step(config, plan, workers) -> tuple[list[Span], list[Span]]:
    """The spans of the regions and of the sums of the third step."""
    from apps.training.devices import open_device
    from apps.training.models import load_weights
    from apps.training.programs import make_program, require_artifact
    from apps.training.random_step import first_hyperparameters, random_batch

    device = open_device("cpu", config, workers)
    model = load_weights(config, plan.model_config, device)
    program = make_program(config, plan, require_artifact(config, plan), model, workers)
    data, table = random_batch(plan, device), first_hyperparameters(plan, model, device)
    regions: list[Span] = []
    sums: list[Span] = []
    watch_regions(program.binding, regions)
    watch_sums(program, sums)
    for _ in range(3):
        workers.barrier()
        regions.clear()
        sums.clear()
        program.train_step([data], table, None)
    return list(regions), list(sums)


def watch_regions(binding, spans: list[Span]) -> None:
    run = binding.run

    def timed(name, tensors):
        begin = time.perf_counter()
        outputs = run(name, tensors)
        spans.append((name, begin, time.perf_counter()))
        return outputs

    binding.run = timed


def watch_sums(program, spans: list[Span]) -> None:
    from torch.futures import collect_all

    reducer, ends = program.reducer, {program.head_group: "head", program.embed_group: "embed"}
    send = reducer._send

    def timed() -> None:
        begin = time.perf_counter()
        send()
        bucket = reducer._travelling[-1]
        groups = "+".join(ends.get(group, str(group)) for group, _ in bucket.groups)
        done = collect_all([work.get_future() for work in bucket.works])
        done.then(lambda _: spans.append((groups, begin, time.perf_counter())))

    reducer._send = timed


def hidden(regions: list[Span], sums: list[Span]) -> dict[str, float]:
    """The share of the sums' time in which a region runs, and what follows the last backward."""
    total = sum(end - begin for _, begin, end in sums)
    under = sum(max(0.0, min(end, stop) - max(begin, start)) for _, begin, end in sums for _, start, stop in regions)
    backward = max(stop for name, _, stop in regions if "backward" in name)
    bare = max(end for _, _, end in sums) - backward
    return {"sums_ms": round(total * 1e3, 1), "under_regions": round(under / total, 3), "bare_ms": round(bare * 1e3, 1)}


def draw(regions: list[Span], sums: list[Span], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"forward": "#7aa6c2", "train": "#e0b04b", "backward": "#c2605a", "update": "#6b9e78"}
    figure, axes = pyplot.subplots(figsize=(11, 2.2), layout="constrained")
    start = regions[0][1]
    labelled: set[str] = set()
    for name, begin, end in regions:
        kind = next((kind for kind in colours if kind in name), "forward")
        label = None if kind in labelled else {"train": "head"}.get(kind, kind)
        labelled.add(kind)
        axes.barh(
            1, (end - begin) * 1e3, left=(begin - start) * 1e3, color=colours[kind], edgecolor="white", label=label
        )
    for name, begin, end in sums:
        left, width = (begin - start) * 1e3, (end - begin) * 1e3
        axes.barh(0, width, left=left, color="#8a6fb0", edgecolor="white")
        axes.text(left + width / 2, 0, name, ha="center", va="center", fontsize=7, color="white")
    axes.set_yticks([0, 1], ["sums of groups", "regions"])
    axes.set_xlabel("milliseconds into the step")
    axes.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
