"""What compression does to held-out perplexity: five methods, two ways to spend the budget, before and after tuning.

    python benchmarks/low_rank.py out=outputs/low-rank-study jobs=6 minutes=10
    python benchmarks/low_rank.py out=outputs/low-rank-study models=benchmarks/low_rank_model steps=400 tune=40 \
        tokens=16384 length=128 vocabulary=2048 dev_ratio=0.005 jobs=1 optimizer.lr=3e-3 compile.target=eager

Trains a dense model on the corpus every machine has, compresses it at each share `keep` by each method with each
allocation, and trains every one of these, and the dense model itself, for the same `tune` further steps on the same
rows. Settings are train_llm.py's (for all trainings), and those of OWN: `steps` of the dense training (empty: those of
MODELS) or the `minutes` it is to take, counted from the pace of its first steps; `tune_lr` is the peak of both a linear
rise and fall; `tokens` of calibration; `input`, `length` of a row, `vocabulary` and `dev_ratio` as prepare_data.py
takes them; `tune_seed` orders the rows; `models` by name or folder. The short trainings are eager: with `spectrum` no
two compressed models have layers of the same shapes. `jobs` of them run at a time, on `gpus` of the machine's in turn;
`launcher="torchrun --no-python --nproc-per-node 2"` trains the dense model with as many workers. What is done is not
done again, so a stopped study goes on; `report=only` shows what is there. `out` gets low-rank.md, .png, .json, and a
log for each part.
"""

import csv
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.training.reporting.output_folder import METRICS  # noqa: E402
from benchmarks.low_rank_report import Figures, Found, picture, table  # noqa: E402

# the settings of a model's trainings; the steps of its dense one, unless others are asked for
MODELS = {
    "demo": (["training.batch_size=8", "optimizer.lr=2e-3"], 500),
    "clm-60m": (["training.batch_size=16", "optimizer.lr=1e-3"], 1000),
}
OTHER_MODELS = (["training.batch_size=8", "optimizer.lr=1e-3"], 500)
METHODS = ("svd", "asvd", "svd_llm", "mimic", "mimic_dense")  # the last: mimic with compress.targets=dense
ALLOCATIONS = ("uniform", "spectrum")
OWN = {
    "out": "outputs/low-rank-study",
    "jobs": "2",
    "gpus": "1",
    "launcher": "",
    "models": ",".join(MODELS),
    "keeps": "0.8,0.6,0.4",
    "methods": ",".join(METHODS),
    "allocations": ",".join(ALLOCATIONS),
    "steps": "",
    "minutes": "",
    "tune": "100",
    "tune_lr": "3e-4",
    "tune_seed": "7",
    "tokens": "65536",
    "input": "corpus",
    "length": "256",
    "vocabulary": "4096",
    "dev_ratio": "0.05",
    "report": "after",
}
PACE_STEPS = 30


@dataclass(frozen=True)
class Case:
    """One compression of a model; without a method the dense model itself."""

    model: str
    method: str = "dense"
    allocation: str = ""
    keep: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (Path(self.model).name, self.method, self.allocation, self.keep)))


class Study:
    """Carries out its parts in a folder, some at a time."""

    def __init__(self, own: dict[str, str], settings: list[str]) -> None:
        self.own, self.settings, self.out = own, settings, Path(own["out"]).resolve()
        self.models, self.keeps = own["models"].split(","), own["keeps"].split(",")
        self.methods, self.allocations = [*filter(None, own["methods"].split(","))], own["allocations"].split(",")
        self.jobs = int(own["jobs"])

    def cases(self, model: str) -> list[Case]:
        compressed = [
            Case(model, method, allocation, keep)
            for keep in self.keeps
            for method in self.methods
            for allocation in self.allocations
        ]
        return [Case(model), *compressed]

    def program(
        self, log: str, script: str, *arguments: str, at_once: int = 1, gpu: int | None = None, launcher: str = ""
    ) -> None:
        """Run a script to its end, one of `at_once` that share the cores; the log appears when it has ended well."""
        path = self.out / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        cores = len(os.sched_getaffinity(0))
        threads = {name: str(max(1, cores // at_once)) for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")}
        started, partial = time.monotonic(), path.with_suffix(".running")
        with partial.open("w") as file:
            command = [*shlex.split(launcher), sys.executable, script, *arguments]
            devices = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)}
            environment = os.environ | threads | devices
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        partial.replace(path if done.returncode == 0 else path.with_suffix(".failed"))
        outcome = "done  " if done.returncode == 0 else "FAILED"
        print(f"{outcome} {log}, {time.monotonic() - started:.0f} s", flush=True)

    def is_done(self, log: str) -> bool:
        return (self.out / "logs" / f"{log}.log").exists()

    def text(self, log: str) -> str:
        path = self.out / "logs" / f"{log}.log"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def carry_out(self) -> None:
        if not self.is_done("prepare"):
            shutil.rmtree(self.out / "dataset", ignore_errors=True)
            data = [f"input={self.own['input']}", f"output_dir={self.out}/dataset"]
            data += [f"max_seq_length={self.own['length']}", f"vocab_size={self.own['vocabulary']}"]
            data += [f"dev_ratio={self.own['dev_ratio']}"]
            self.program("prepare", "apps/prepare_data.py", *data)
        for model in self.models:
            self.train_dense(model)
            if not self.is_done(Case(model).name):
                sys.exit(
                    f"error: The dense {model} was not trained. Its log: {self.out}/logs/{Case(model).name}.failed"
                )
        if not self.methods:
            return
        cases = [case for model in self.models for case in self.cases(model)]
        with ThreadPoolExecutor(self.jobs) as pool:
            gpus = cycle(range(int(self.own["gpus"])) if self.own["gpus"] != "1" else (None,))
            list(pool.map(self.compress_and_tune, cases, gpus))

    def training(self, model: str, output: Path, steps: int, *more: str) -> list[str]:
        given = [*MODELS.get(model, OTHER_MODELS)[0], f"model.max_seq_length={self.own['length']}", "logging.every=100"]
        given += [f"training.max_steps={steps}"]
        given += [f"schedule.warmup_steps={max(1, steps // 20)}", f"training.dataset={self.out}/dataset"]
        given += [f"training.output_dir={output}", "training.overwrite_output_dir=true"]
        given += [f"compile.output_dir={self.out}/artifacts", *self.settings, *more]
        return [f"{key}={value}" for key, value in dict(each.split("=", 1) for each in given).items()]

    def train_dense(self, model: str) -> None:
        """From random weights, through the artifact."""
        dense = Case(model).name
        if self.is_done(dense):
            return
        start = f"checkpoint.config_name={model}"
        if not self.is_done(f"{dense}-compile") and "compile.target=eager" not in self.settings:
            given = self.training(model, self.folder(dense), 1, start)
            self.program(f"{dense}-compile", "apps/train_llm.py", "command=compile", *given)
        steps = int(self.own["steps"] or MODELS.get(model, OTHER_MODELS)[1])
        if self.own["minutes"]:
            pace = self.folder(f"{dense}-pace")
            given = self.training(model, pace, PACE_STEPS, start, "training.evaluate=false")
            self.program(f"{dense}-pace", "apps/train_llm.py", "command=run", *given, launcher=self.own["launcher"])
            steps = math.ceil(60 * float(self.own["minutes"]) / seconds_of_a_step(pace))
        given = self.training(model, self.folder(dense), steps, start)
        self.program(dense, "apps/train_llm.py", "command=run", *given, launcher=self.own["launcher"])

    def compress_and_tune(self, case: Case, gpu: int | None) -> None:
        dense = self.folder(Case(case.model).name)
        small = dense if case.method == "dense" else self.folder(f"{case.name}-small")
        log = f"{case.name}-compress"
        if case.method != "dense" and not self.is_done(log):
            shutil.rmtree(small, ignore_errors=True)
            method, targets = case.method.removesuffix("_dense"), case.method.endswith("_dense")
            given = [f"checkpoint.model_name_or_path={dense}", f"output_dir={small}", f"compress.method={method}"]
            given += [f"compress.targets={'dense' if targets else 'own'}", f"compress.allocation={case.allocation}"]
            given += [f"compress.keep={case.keep}", f"compress.calibration={self.out}/dataset"]
            given += [f"compress.tokens={self.own['tokens']}", f"max_seq_length={self.own['length']}"]
            self.program(log, "apps/compress_llm.py", *given, at_once=self.jobs, gpu=gpu)
        if not self.is_done(f"{case.name}-tune"):
            start = [f"checkpoint.model_name_or_path={small}", "compile.target=eager"]
            start += [f"optimizer.lr={self.own['tune_lr']}", f"training.seed={self.own['tune_seed']}"]
            given = self.training(case.model, self.folder(f"{case.name}-tuned"), int(self.own["tune"]), *start)
            self.program(f"{case.name}-tune", "apps/train_llm.py", "command=run", *given, at_once=self.jobs, gpu=gpu)

    def folder(self, name: str) -> Path:
        return self.out / "runs" / name

    def figures(self, case: Case) -> Figures:
        if case.method == "dense":
            return Figures(evaluated(self.text(case.name)), evaluated(self.text(f"{case.name}-tune")))
        found = re.findall(r"^Perplexity after: (\S+)$", self.text(f"{case.name}-compress"), re.MULTILINE)
        return Figures(float(found[-1]) if found else None, evaluated(self.text(f"{case.name}-tune")))

    def found(self, model: str) -> Found:
        figures = {(case.method, case.allocation, case.keep): self.figures(case) for case in self.cases(model)}
        return Found(Path(model).name, self.methods, self.allocations, self.keeps, figures)


def seconds_of_a_step(folder: Path) -> float:
    """The median of a run's steps, the first three left out."""
    with (folder / METRICS).open(newline="") as file:
        return statistics.median(float(row["Time per Step"]) for row in list(csv.DictReader(file))[3:])


def evaluated(log: str) -> float | None:
    """The perplexity that a training ended with."""
    found = re.findall(r"^Evaluation loss: \S+, Perplexity: (\S+)$", log, re.MULTILINE)
    return float(found[-1]) if found else None


def main() -> None:
    own, settings = dict(OWN), []
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            settings.append(argument)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    study = Study(own, settings)
    study.out.mkdir(parents=True, exist_ok=True)
    if own["report"] != "only":
        study.carry_out()
    if not study.methods:
        return
    studies = [study.found(model) for model in study.models]
    text = "\n\n".join(f"**{found.model}**\n\n{table(found)}" for found in studies) + "\n"
    (study.out / "low-rank.md").write_text(text, encoding="utf-8")
    results = {case.name: asdict(study.figures(case)) for model in study.models for case in study.cases(model)}
    (study.out / "low-rank.json").write_text(json.dumps(results, indent=1))
    picture(studies, study.out / "low-rank.png")
    print(text)


if __name__ == "__main__":
    main()
