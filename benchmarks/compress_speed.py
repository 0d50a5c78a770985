"""Seconds and memory that compressing a model takes: random weights of a named shape, random calibration tokens.

    python benchmarks/compress_speed.py config_name=tinyllama-1.1b rows=256 length=2048
    python benchmarks/compress_speed.py config_name=demo rows=16 length=256 dtype=float32 device=cpu

Settings are those of OWN: `batch_size` rows go through a block at a time; `method`, `allocation`, `keep`, `inputs`,
`targets`, `weighting` as compress_llm.py takes them. Prints one JSON line: seconds (by what they went to, and in all),
and on a GPU the peak of memory beside what the model itself takes.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.training.cli import run_main  # noqa: E402
from benchmarks.own_settings import own_settings  # noqa: E402

OWN = {
    "config_name": "tinyllama-1.1b",
    "rows": "256",
    "length": "2048",
    "batch_size": "8",
    "dtype": "bfloat16",
    "method": "mimic",
    "allocation": "uniform",
    "keep": "0.5",
    "inputs": "compressed",
    "targets": "own",
    "weighting": "equal",
    "device": "auto",
}


def program(argv: Sequence[str]) -> None:
    own = own_settings(OWN, argv)

    import torch

    import modelzoo
    from apps.training.devices import choose_device, describe
    from modelzoo.compression import compress_model

    device = torch.device(choose_device(own["device"]))
    on_gpu = device.type == "cuda"
    config = modelzoo.load_config(config_name=own["config_name"], max_seq_length=int(own["length"]))
    model = modelzoo.build_model(config, device=device, dtype=own["dtype"]).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (int(own["rows"]), int(own["length"]))
    rows = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
    batches = [{"input_ids": part, "use_cache": False} for part in rows.split(int(own["batch_size"]))]

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    if on_gpu:
        torch.linalg.eigh(torch.eye(64, dtype=torch.float64, device=device))  # the libraries' own start is not measured
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    began = last = now()
    layers: dict[str, float] = {}

    def on_layer(report) -> None:
        nonlocal last
        moment = now()
        kind = report.name.rpartition(".")[2]
        layers[kind] = layers.get(kind, 0.0) + moment - last
        last = moment

    reports = compress_model(
        model,
        batches,
        method=own["method"],
        keep=float(own["keep"]),
        allocation=own["allocation"],
        inputs=own["inputs"],
        targets=own["targets"],
        weighting=own["weighting"],
        on_layer=on_layer,
    )
    seconds = now() - began
    line = {"device": describe(device), "tokens": rows.numel(), "layers": len(reports), "seconds": round(seconds, 1)}
    # a block's first layer has the forward passes and the moments in its time, the others their own factors alone
    line |= {"seconds_by_layer": {kind: round(value, 1) for kind, value in layers.items()}}
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
        line |= {"model_gib": round(before / 2**30, 2), "peak_beyond_it_gib": round((peak - before) / 2**30, 2)}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(program))
