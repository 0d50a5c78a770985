"""The dense model that low_rank_rates.py and low_rank_seeds.py compress, and the dataset it is trained on.

    python benchmarks/low_rank_dense.py out=outputs/low-rank-demo model=demo steps=1500
    python benchmarks/low_rank_dense.py out=outputs/low-rank-study model=benchmarks/low_rank_model steps=400 \
        length=128 vocabulary=2048 dev_ratio=0.005 optimizer.lr=3e-3 compile.target=eager

Makes `out`/dataset (`input`, `length` of a row, `vocabulary` and `dev_ratio` as prepare_data.py takes them) and
trains `model`, a named shape or a folder, from random weights into `out`/dense: for so many `steps`, or for `minutes`
counted from the pace of its first ones. Other settings are train_llm.py's. `launcher="torchrun --no-python
--nproc-per-node 2"` trains with as many workers. What is done is not done again, and `dataset` may name one that is
there. `out`/logs has a log for each part.
"""

import csv
import math
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.training.cli import run_main  # noqa: E402
from apps.training.reporting.output_folder import METRICS  # noqa: E402
from backends.errors import UserError  # noqa: E402
from benchmarks.own_settings import own_and_others  # noqa: E402

# the settings of a model's training
MODELS = {
    "demo": {"training.batch_size": "8", "optimizer.lr": "2e-3"},
    "clm-60m": {"training.batch_size": "16", "optimizer.lr": "1e-3"},
}
OTHER_MODELS = {"training.batch_size": "8", "optimizer.lr": "1e-3"}
OWN = {
    "out": "outputs/low-rank-study",
    "model": "demo",
    "steps": "",
    "minutes": "",
    "launcher": "",
    "dataset": "",
    "input": "corpus",
    "length": "256",
    "vocabulary": "4096",
    "dev_ratio": "0.05",
}
PACE_STEPS = 30


def program(argv: Sequence[str]) -> None:
    own, given = own_and_others(OWN, argv)
    if bool(own["steps"]) == bool(own["minutes"]):
        raise UserError("Expected one of steps=N and minutes=M, which say how long the training is.")
    if not re.fullmatch(r"\d+" if own["steps"] else r"\d+(\.\d+)?", own["steps"] or own["minutes"]):
        raise UserError(f"steps={own['steps']} minutes={own['minutes']}: no number. Expected e.g. steps=400.")
    out = Path(own["out"]).resolve()
    dataset = Path(own["dataset"] or out / "dataset").resolve()
    if not own["dataset"]:
        wanted: dict[str, object] = {"input": own["input"], "output_dir": dataset, "max_seq_length": own["length"]}
        wanted |= {"vocab_size": own["vocabulary"], "dev_ratio": own["dev_ratio"]}
        carry_out(out, "prepare", "apps/prepare_data.py", arguments(wanted))
    settings: dict[str, object] = {
        "checkpoint.config_name": own["model"],
        "model.max_seq_length": own["length"],
        "training.dataset": dataset,
        "training.overwrite_output_dir": "true",
        "compile.output_dir": out / "artifacts",
        "logging.every": 100,
    }
    settings |= MODELS.get(own["model"], OTHER_MODELS) | given
    if settings.get("compile.target") != "eager":
        carry_out(out, "compile", "apps/train_llm.py", ["command=compile", *arguments(settings)])
    steps = int(own["steps"] or steps_of(float(own["minutes"]), out, settings, own["launcher"]))
    schedule = {"training.max_steps": steps, "schedule.warmup_steps": max(1, steps // 20)}
    training = {"training.output_dir": out / "dense"} | schedule | settings
    carry_out(out, "train", "apps/train_llm.py", ["command=run", *arguments(training)], own["launcher"])


def arguments(settings: Mapping[str, object]) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items()]


def steps_of(minutes: float, out: Path, settings: Mapping[str, object], launcher: str) -> int:
    """How many steps are taken in so many minutes, by the median of a few; the first three are left out."""
    short = {"training.output_dir": out / "pace", "training.max_steps": PACE_STEPS, "training.evaluate": "false"}
    carry_out(out, "pace", "apps/train_llm.py", ["command=run", *arguments(settings | short)], launcher)
    with (out / "pace" / METRICS).open(newline="") as file:
        seconds = statistics.median(float(row["Time per Step"]) for row in list(csv.DictReader(file))[3:])
    return math.ceil(60 * minutes / seconds)


def carry_out(out: Path, part: str, script: str, given: list[str], launcher: str = "") -> None:
    """Run a script to its end, unless it has been; the log has its name when it ended well. UserError if it did not."""
    log = out / "logs" / f"{part}.log"
    if log.exists():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    started, partial = time.monotonic(), log.with_suffix(".running")
    with partial.open("w") as file:
        command = [*shlex.split(launcher), sys.executable, script, *given]
        done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        partial.replace(log.with_suffix(".failed"))
        raise UserError(f"{script} ended with {done.returncode}. What it said: {log.with_suffix('.failed')}")
    partial.replace(log)
    print(f"{part}: {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_main(program))
