"""Compile time against depth: the same block 6, 24 and 96 times, in turns.

    python benchmarks/compile_depth.py [rounds=3 section.key=value …]

Prints the median of the rounds for each depth. A first round, which fills the system's file caches, is left out, unless
rounds=0 wants no other.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    from apps.training.compile_command import compile_artifact
    from apps.training.config import parse
    from apps.training.step_plan import plan_step

    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6}
    model = {"model_type": "llama", "vocab_size": 8192, "max_position_embeddings": 2048, **shape}
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    rounds = int(given.pop("rounds", "3"))
    seconds: dict[int, list[float]] = {layers: [] for layers in (6, 24, 96)}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + rounds):
            for layers, times in seconds.items():
                config_folder = Path(folder) / f"layers{layers}"
                config_folder.mkdir(exist_ok=True)
                (config_folder / "config.json").write_text(json.dumps(model | {"num_hidden_layers": layers}))
                settings = [f"checkpoint.config_name={config_folder}", f"compile.output_dir={folder}/artifacts"]
                settings += ["training.batch_size=4", *(f"{key}={value}" for key, value in given.items())]
                started = time.perf_counter()
                config = parse(["command=compile", *settings])
                artifact = compile_artifact(config, plan_step(config))
                times.append(time.perf_counter() - started)
                line = {"layers": layers, "seconds": round(times[-1], 1), "mib": size(artifact.path)}
                print(json.dumps(line), flush=True)
    medians = {layers: statistics.median(times[1:] or times) for layers, times in seconds.items()}
    print(json.dumps({"medians": {layers: round(median, 1) for layers, median in medians.items()}}))
    print(f"longest / shortest of the medians: {max(medians.values()) / min(medians.values()):.3f}")


def size(path: Path) -> float:
    return round(path.stat().st_size / 2**20, 1)


if __name__ == "__main__":
    main()
