"""What compression does to held-out perplexity: methods, two ways to spend the budget, before and after tuning.

    python benchmarks/low_rank_rates.py model=outputs/low-rank-demo/dense dataset=outputs/low-rank-demo/dataset \
        out=outputs/low-rank-demo/rates tune_lrs=1e-4 seeds=7,8,9 processes=2

Compresses the dense model `model`, of low_rank_dense.py, by each of `methods` with each of `allocations` at each of
`keeps`, and trains each of these, and the dense model, for `tune` steps of `batch` rows at each peak of `tune_lrs`,
once for each of `seeds`, which order the rows. What counts is the mean over the seeds at a case's best peak.
`processes` of them share the machine's GPUs. Each case leaves a file in `out` and is not done again; the table and
picture, `low-rank.md` and `low-rank.png`, are made of what is there (`processes=0`: of nothing new).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.training.cli import run_main  # noqa: E402
from backends.errors import UserError, unknown  # noqa: E402
from benchmarks.low_rank_report import DENSE, Figures, Found, picture, table  # noqa: E402
from benchmarks.own_settings import own_settings  # noqa: E402

OWN = {
    "model": "",
    "dataset": "",
    "out": "outputs/low-rank-rates",
    "length": "256",
    "tokens": "65536",
    "batch": "8",
    "tune": "100",
    "tune_lrs": "3e-5,1e-4,3e-4",
    "keeps": "0.8,0.6,0.4",
    "methods": "svd,asvd,svd_llm,mimic,mimic_dense,mimic_gradient",
    "allocations": "uniform,spectrum",
    "seeds": "7,8,9",
    "processes": "1",
    "part": "",  # 0/6: the first of six processes
}
KNOWN = ("svd", "asvd", "svd_llm", "mimic", "mimic_dense", "mimic_gradient")  # the last two: low_rank_training.VARIANTS
Case = tuple[str, str, str]  # method, allocation, keep


def checked(own: dict[str, str]) -> dict[str, str]:
    """The settings; UserError for one that no process could use."""
    for name in ("model", "dataset"):
        if not own[name] and own["processes"] != "0":
            raise UserError(f"{name} is not given. Expected {name}=DIR, see the first lines of this file.")
    for name in ("length", "tokens", "batch", "tune", "processes", "seeds", "tune_lrs", "keeps"):
        for each in own[name].split(","):
            try:
                float(each) if name in ("tune_lrs", "keeps") else int(each)
            except ValueError:
                raise UserError(f"{name}={own[name]}: '{each}' is no number. Expected e.g. {OWN[name]}.") from None
    for method in own["methods"].split(","):
        if method not in KNOWN:
            raise unknown("method", method, KNOWN)
    for allocation in own["allocations"].split(","):
        if allocation not in ("uniform", "spectrum"):
            raise unknown("allocation", allocation, ("uniform", "spectrum"))
    return own


def cases_of(own: dict[str, str]) -> list[Case]:
    lists = (own[name].split(",") for name in ("keeps", "methods", "allocations"))
    return [DENSE, *((method, allocation, keep) for keep, method, allocation in product(*lists))]


def file_of(own: dict[str, str], case: Case) -> Path:
    return Path(own["out"]) / f"{'-'.join(filter(None, case))}.json"


def carry_out(own: dict[str, str], cases: Sequence[Case]) -> None:
    """Compress and train `cases` in this process, one after the other."""
    from benchmarks.low_rank_training import calibration_of, compressed, open_both, perplexity, tuned

    dense, dataset = open_both(own)
    calibration, batch = calibration_of(dense, dataset, own), int(own["batch"])
    for method, allocation, keep in cases:
        began, path = time.monotonic(), file_of(own, (method, allocation, keep))
        model = dense if method == "dense" else compressed(dense, calibration, method, float(keep), allocation)
        before, made = perplexity(model, dataset, batch), time.monotonic()
        after = {
            rate: [tuned(model, dataset, own, int(seed), float(rate)) for seed in own["seeds"].split(",")]
            for rate in own["tune_lrs"].split(",")
        }
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps({"before": before, "after": after}))
        partial.replace(path)
        seconds = f"{made - began:.0f} and {time.monotonic() - made:.0f} s"
        rates = ", ".join(f"{mean(values):.3f} ({rate})" for rate, values in after.items())
        print(f"{path.stem}: {before:.3f}, trained {rates}; {seconds}", flush=True)


def share_out(own: dict[str, str], processes: int) -> None:
    """Carry out the missing cases in as many processes, on the machine's GPUs in turn."""
    import torch

    gpus, command = torch.cuda.device_count(), [sys.executable, __file__, *sys.argv[1:]]
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes))}
    running = []
    for index in range(processes):
        device = {"CUDA_VISIBLE_DEVICES": str(index % gpus)} if gpus else {}
        environment = os.environ | threads | device
        running.append(subprocess.Popen([*command, f"part={index}/{processes}"], env=environment))
    codes = [process.wait() for process in running]
    if any(codes):
        raise UserError("Not all cases were carried out; what went wrong is said above. Start it again to go on.")


def figures_of(own: dict[str, str], case: Case) -> Figures:
    path = file_of(own, case)
    if not path.exists():
        return Figures(None, None)
    found = json.loads(path.read_text())
    return Figures(found["before"], min(mean(values) for values in found["after"].values()))


def program(argv: Sequence[str]) -> None:
    own = checked(own_settings(OWN, argv))
    cases = cases_of(own)
    missing = [case for case in cases if not file_of(own, case).exists()]
    Path(own["out"]).mkdir(parents=True, exist_ok=True)
    if own["part"]:
        index, processes = map(int, own["part"].split("/"))
        carry_out(own, missing[index::processes])
        return
    if missing and int(own["processes"]):
        share_out(own, int(own["processes"]))
    keeps, methods, allocations = (own[name].split(",") for name in ("keeps", "methods", "allocations"))
    figures = {case: figures_of(own, case) for case in cases}
    found = Found(methods, allocations, keeps, figures)
    (Path(own["out"]) / "low-rank.md").write_text(table(found) + "\n", encoding="utf-8")
    picture(found, Path(own["out"]) / "low-rank.png")
    print(table(found))


if __name__ == "__main__":
    sys.exit(run_main(program))
