"""How long N workers take from the command to the end of the first step, against one worker; runs in turns.

    python benchmarks/start_up.py [workers=2 rounds=5 launcher="mpirun -np"] SETTINGS
    python benchmarks/start_up.py workers=2 launcher="torchrun --no-python --nproc-per-node" checkpoint.config_name=…

Real runs of apps/train_llm.py, each worker with the same rows, both numbers of workers behind the same launcher: on
CPUs through gloo, on GPUs through NCCL. A run is timed until the first row is in its CSV. The artifact is compiled
first, and the first run of each kind, which reads everything from disk for the first time, is left out.
"""

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = {"workers": "2", "rounds": "5", "launcher": "mpirun -np"}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    own = {name: given.pop(name, default) for name, default in OWN.items()}
    settings = [f"{key}={value}" for key, value in given.items()]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "run")
        settings += [f"compile.output_dir={folder}/artifacts", f"training.output_dir={output}"]
        settings += ["training.max_steps=1", "training.evaluate=false"]
        compile_command = [sys.executable, str(ROOT / "apps/train_llm.py"), "command=compile", *settings]
        subprocess.run(compile_command, check=True, stdout=subprocess.DEVNULL)
        seconds: dict[int, list[float]] = {1: [], int(own["workers"]): []}
        for _ in range(1 + int(own["rounds"])):
            for count, taken in seconds.items():
                taken.append(to_first_step(launcher(own["launcher"], count), settings, output))
    one, many = (taken[1:] for taken in seconds.values())
    ratios = [ours / theirs for ours, theirs in zip(many, one, strict=True)]
    line = {f"{count} workers_s": round(statistics.median(taken[1:]), 2) for count, taken in seconds.items()}
    print(json.dumps(line | {"ratio": round(statistics.median(ratios), 3), "pairs": [round(r, 3) for r in ratios]}))


def launcher(command: str, count: int) -> list[str]:
    """The launcher of this Python's environment, if it has one of that name; torchrun starts programs by itself."""
    program, *options = shlex.split(command)
    found = shutil.which(program, path=Path(sys.executable).parent) or program
    return [found, *options, str(count), *([] if "torchrun" in program else [sys.executable])]


def to_first_step(prefix: list[str], settings: list[str], output: Path) -> float:
    """Seconds from the start of a run to its first row; returns when it has ended."""
    shutil.rmtree(output, ignore_errors=True)
    begin = time.perf_counter()
    command = [*prefix, str(ROOT / "apps/train_llm.py"), "command=run", *settings]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not has_row(output):
            time.sleep(0.002)
        seconds = time.perf_counter() - begin
    if process.returncode != 0 or not has_row(output):
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}")
    return seconds


def has_row(output: Path) -> bool:
    path = output / "per_step_metrics.csv"
    return path.exists() and path.read_bytes().count(b"\n") >= 2  # the header and a step


if __name__ == "__main__":
    main()
