"""From opening an artifact to the end of its first step, in a fresh process without compiler, caches or home.

    python benchmarks/first_step.py checkpoint.config_name=demo training.batch_size=16

The artifact is compiled first, in this process. The child's imports and weights are timed apart, and not counted.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    from apps.training.compile_command import compile_artifact, summary
    from apps.training.config import parse
    from apps.training.step_plan import plan_step

    with tempfile.TemporaryDirectory() as folder:
        settings = ["command=compile", f"compile.output_dir={folder}", *sys.argv[1:]]
        config = parse(settings)
        plan = plan_step(config)
        artifact = compile_artifact(config, plan)
        print(summary(artifact, plan), flush=True)
        empty, temporary, caches = (Path(folder) / name for name in ("empty", "tmp", "caches"))
        for path in (empty, temporary, caches):
            path.mkdir()
        environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "CUDA_HOME")}
        environment |= {"PATH": str(empty), "HOME": "/proc/self/nowhere", "TMPDIR": str(temporary)}
        environment |= {"TORCHINDUCTOR_CACHE_DIR": str(caches), "TRITON_CACHE_DIR": str(caches / "triton")}
        command = [sys.executable, __file__, "child", str(artifact.path), *settings]
        subprocess.run(command, env=environment, check=True, cwd=ROOT)
        print(json.dumps({"files left in the caches": sum(path.is_file() for path in caches.rglob("*"))}))


def child(path: Path, settings: list[str]) -> None:
    """Load the artifact and take three steps, counting the processes that are started on the way."""
    started = time.perf_counter()
    import torch

    from apps.training.config import parse
    from apps.training.devices import wait
    from apps.training.models import load_weights
    from apps.training.random_step import first_hyperparameters, random_batch
    from apps.training.step_plan import plan_step
    from compiled.artifact import open_artifact
    from compiled.program import CompiledProgram

    config = parse(settings)
    plan = plan_step(config)
    device = torch.device(plan.spec.device["kind"])
    if device.type == "cuda":
        import torch._inductor.compile_fx
        import torch._inductor.standalone_compile
        import triton  # noqa: F401

        torch.zeros(1, device=device)
    imports = time.perf_counter() - started
    model = load_weights(config, plan.model_config, device)
    hyper = first_hyperparameters(plan, model, device)
    data = random_batch(plan, device)
    wait(device)
    weights = time.perf_counter() - started - imports

    processes: list[str] = []
    doors = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec", "os.system"}
    sys.addaudithook(lambda event, arguments: processes.append(f"{event} {arguments[:2]}") if event in doors else None)
    begin = time.perf_counter()
    precision = plan.precision
    program = CompiledProgram(
        open_artifact(path),
        model,
        moments_dtype=getattr(torch, precision.moments),
        master_dtype=None if precision.master == "none" else getattr(torch, precision.master),
    )
    loaded = time.perf_counter()
    seconds = []
    for _ in range(3):
        loss = program.train_step([data], hyper, None).loss.item()
        seconds.append(round(time.perf_counter() - loaded - sum(seconds), 3))
    line = {"imports_s": round(imports, 2), "weights_s": round(weights, 2), "load_s": round(loaded - begin, 3)}
    line |= {"steps_s": seconds, "open_to_first_step_s": round(loaded - begin + seconds[0], 3), "loss": loss}
    print(json.dumps(line | {"processes_started": processes}), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
