"""Two workers with a thread each against one process with two threads: the same rows in a step, runs in turns.

    python benchmarks/two_workers.py [rounds=3 steps=10 batch_size=8 SETTINGS]

Real runs of apps/train_llm.py on the embedded corpus, on this machine's CPU: `mpirun -np 2` with `batch_size` rows a
worker, and one process with an artifact for twice as many. Prints the median tokens per second of each (its first two
steps left out) and the median ratio of the pairs.
"""

import csv
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = {"rounds": "3", "steps": "10", "batch_size": "8"}


def main() -> None:
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    own = {name: int(given.pop(name, default)) for name, default in OWN.items()}
    settings = [f"{key}={value}" for key, value in given.items()]
    mpirun = shutil.which("mpirun", path=Path(sys.executable).parent) or "mpirun"
    with tempfile.TemporaryDirectory() as folder:
        common = [*settings, "compile.arch=cpu", f"compile.output_dir={folder}/artifacts"]
        common += ["training.evaluate=false", f"training.max_steps={own['steps']}", f"training.output_dir={folder}/run"]
        common += ["training.overwrite_output_dir=true", "logging.every=1000"]
        variants = {
            "two workers": ([mpirun, "-np", "2"], [f"training.batch_size={own['batch_size']}", "run.num_threads=1"]),
            "one process": ([], [f"training.batch_size={2 * own['batch_size']}", "run.num_threads=2"]),
        }
        for _, shape in variants.values():
            train_llm([], ["command=compile", *common, *shape])
        rates: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(own["rounds"]):
            for name, (launcher, shape) in variants.items():
                train_llm(launcher, ["command=run", *common, *shape])
                rates[name].append(tokens_per_second(Path(folder, "run", "per_step_metrics.csv")))
    ratios = [ours / theirs for ours, theirs in zip(rates["two workers"], rates["one process"], strict=True)]
    medians = {name: round(statistics.median(values)) for name, values in rates.items()}
    print(json.dumps(medians | {"two workers / one process": round(statistics.median(ratios), 3), "pairs": ratios}))


def train_llm(launcher: list[str], arguments: list[str]) -> None:
    command = [*launcher, sys.executable, str(ROOT / "apps/train_llm.py"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def tokens_per_second(path: Path) -> float:
    """The median over the steps of a run, the first two left out."""
    rows = list(csv.DictReader(path.open()))[2:]
    return statistics.median(int(row["Tokens in Step"]) / float(row["Time per Step"]) for row in rows)


if __name__ == "__main__":
    main()
