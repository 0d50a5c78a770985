"""Compile time against depth: the same block 6, 24 and 96 times, one compile after another.

    python benchmarks/compile_depth.py [section.key=value …]

A first compile of 2 layers fills the caches of the system compiler's headers, so that the three start alike.
"""

import json
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
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for layers in (2, 6, 24, 96):
            config_folder = Path(folder) / f"layers{layers}"
            config_folder.mkdir()
            (config_folder / "config.json").write_text(json.dumps(model | {"num_hidden_layers": layers}))
            settings = [f"checkpoint.config_name={config_folder}", f"compile.output_dir={folder}/artifacts"]
            started = time.perf_counter()
            config = parse(["command=compile", *settings, "training.batch_size=4", *sys.argv[1:]])
            artifact = compile_artifact(config, plan_step(config))
            seconds[layers] = time.perf_counter() - started
            print(json.dumps({"layers": layers, "seconds": round(seconds[layers], 1), "mib": size(artifact.path)}))
    spread = max(seconds[layers] for layers in (6, 24, 96)) / min(seconds[layers] for layers in (6, 24, 96))
    print(f"longest / shortest of 6, 24, 96 layers: {spread:.3f}")


def size(path: Path) -> float:
    return round(path.stat().st_size / 2**20, 1)


if __name__ == "__main__":
    main()
