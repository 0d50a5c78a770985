"""Does a language model learn on simulated optics? Three sizes, from scratch and from dense weights; bits, light.

    python benchmarks/optical_study.py out=outputs/optical-study jobs=5 model.dtype=bfloat16
    python benchmarks/optical_study.py out=outputs/optical-study parts=scratch steps=100 sizes=small

Settings are train_llm.py's, and those of OWN. Every run has the same data, order and seed as its dense twin. What is
there already is not made again, so a stopped study goes on. Tables are printed and kept with their pictures in `out`.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.training.reporting.output_folder import METRICS  # noqa: E402
from backends.routing_table import count_text, plain_table  # noqa: E402

OWN = {
    "out": "outputs/optical-study",
    "jobs": "2",
    "steps": "1000",
    "sizes": "small,medium,large",
    "parts": "scratch,finetune,bits,photons,rates",
}
# width, blocks, heads, key heads, feed-forward width; head_dim 64
SIZES = {"small": (192, 4, 3, 1, 512), "medium": (384, 6, 6, 2, 1024), "large": (768, 8, 12, 4, 2048)}
SCRATCH_RATE, FINETUNE_RATE = 1e-3, 1e-4
BITS, PHOTONS, RATES = (4, 5, 6, 7, 8, 10), (0.1, 1.0, 10.0, 100.0), (1e-5, 1e-4, 1e-3)
SHAPE = ["model.max_seq_length=256", "training.batch_size=32"]
DENSE: dict[str, float] = {}
OPTICAL = {"q_levels": 256}


@dataclass(frozen=True)
class Run:
    """One training: `options` of the optical backend (none: dense), from random weights or from those of `start`."""

    part: str
    size: str
    options: tuple[tuple[str, float], ...]
    start: str | None = None
    rate: float = SCRATCH_RATE

    @property
    def backend(self) -> str:
        return "-".join(["optical", *(f"{key}{value:g}" for key, value in self.options)]) if self.options else "dense"

    @property
    def name(self) -> str:
        kind = "finetune" if self.start else "scratch"
        return f"{self.size}-{kind}-{self.backend}-{self.rate:g}"


def planned(parts: list[str], sizes: list[str]) -> list[Run]:
    """The runs of the chosen parts; one that several parts want appears once for each, under the same name."""
    middle = sizes[len(sizes) // 2]

    def pair(part: str, size: str, options: dict[str, float], rate: float = FINETUNE_RATE) -> list[Run]:
        frozen = tuple(options.items())
        return [Run(part, size, frozen), Run(part, size, frozen, Run("", size, ()).name, rate)]

    runs = []
    for size in sizes:
        for options in (DENSE, OPTICAL):
            scratch, finetune = pair("scratch", size, options)
            runs += [scratch] if "scratch" in parts else []
            runs += [Run("finetune", size, finetune.options, finetune.start, finetune.rate)] * ("finetune" in parts)
    for bits in BITS if "bits" in parts else ():
        runs += pair("bits", middle, {"q_levels": 2**bits})
    for photons in PHOTONS if "photons" in parts else ():
        runs += pair("photons", middle, {**OPTICAL, "photons_per_mac": photons})
    for rate in RATES if "rates" in parts else ():
        runs += [pair("rates", middle, options, rate)[1] for options in (DENSE, OPTICAL)]
    if any(run.start for run in runs):
        known = {run.name for run in runs}
        runs += [Run("start", size, ()) for size in sizes if Run("", size, ()).name not in known]
    return runs


class Study:
    """Carries out runs in a folder, some at a time."""

    def __init__(self, out: Path, jobs: int, steps: int, settings: list[str]) -> None:
        self.out, self.jobs, self.steps, self.settings = out, jobs, steps, settings

    def program(self, log: str, script: str, *arguments: str) -> None:
        path = self.out / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            done = subprocess.run([sys.executable, script, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        print(f"{'done  ' if done.returncode == 0 else 'FAILED'} {log}", flush=True)

    def model(self, size: str) -> str:
        width, blocks, heads, key_heads, inner = SIZES[size]
        config = {"model_type": "llama", "hidden_size": width, "num_hidden_layers": blocks, "head_dim": 64}
        config |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "intermediate_size": inner}
        config |= {"vocab_size": 4096, "max_position_embeddings": 1024, "tie_word_embeddings": False}
        folder = self.out / "models" / size
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
        return str(folder)

    def arguments(self, run: Run) -> list[str]:
        given = [f"checkpoint.config_name={self.model(run.size)}", *SHAPE, *self.settings]
        if run.options:
            given.append(f"backend.default={json.dumps({'use': 'optical', **dict(run.options)})}")
        return [*given, f"compile.output_dir={self.out}/artifacts/{run.size}-{run.backend}"]

    def compile(self, run: Run) -> None:
        if not list((self.out / "artifacts" / f"{run.size}-{run.backend}").glob("*.substrate")):
            self.program(
                f"compile-{run.size}-{run.backend}", "apps/train_llm.py", "command=compile", *self.arguments(run)
            )

    def train(self, run: Run) -> None:
        folder = self.out / "runs" / run.name
        if (folder / "report.html").exists():
            return
        given = self.arguments(run)
        if run.start:
            given[0] = f"checkpoint.model_name_or_path={self.out}/runs/{run.start}"
        steps = self.steps // 3 if run.start else self.steps
        given += [f"training.max_steps={steps}", f"schedule.warmup_steps={steps // 20}", f"optimizer.lr={run.rate}"]
        given += ["optimizer.beta2=0.95"]  # the default when docs/optical.md was measured
        given += [f"training.dataset={self.out}/dataset", f"training.output_dir={folder}", f"logging.every={steps}"]
        given += ["training.overwrite_output_dir=true", "backend.calibrate_steps=4"]
        self.program(run.name, "apps/train_llm.py", "command=run", *given)

    def carry_out(self, runs: list[Run]) -> None:
        dataset = self.out / "dataset"
        if not dataset.exists():
            data = [f"output_dir={dataset}", "max_seq_length=256", "vocab_size=4096"]
            self.program("prepare", "apps/prepare_data.py", *data)
        each = {run.name: run for run in runs}
        artifacts = {(run.size, run.backend): run for run in each.values()}
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(self.compile, artifacts.values()))
            for from_weights in (False, True):
                list(pool.map(self.train, [run for run in each.values() if bool(run.start) == from_weights]))

    def dev_loss(self, run: Run) -> float | None:
        path = self.out / "runs" / run.name / "summary.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [line.split(":")[1].split()[0] for line in lines if line.startswith("Evaluation loss")]
        return float(found[-1].rstrip(",;")) if found else None

    def losses(self, run: Run) -> list[float]:
        with (self.out / "runs" / run.name / METRICS).open(newline="") as file:
            return [float(row["Step Loss"]) for row in csv.DictReader(file)]

    def parameters(self, size: str) -> int:
        width, blocks, heads, key_heads, inner = SIZES[size]
        return blocks * (width * 64 * (2 * heads + 2 * key_heads) + 3 * width * inner + 2 * width) + 8193 * width


def tables(study: Study, runs: list[Run]) -> str:
    """A table for each part: dev loss of each run beside that of its dense twin."""
    text = []
    for part in dict.fromkeys(run.part for run in runs if run.part != "start"):
        rows = [("model", "parameters", "from", "backend", "rate", "dev loss", "beside dense")]
        for run in (run for run in runs if run.part == part):
            twin = Run(part, run.size, (), run.start, run.rate)
            loss, beside = study.dev_loss(run), study.dev_loss(twin)
            ratio = f"{loss / beside:.4f}" if loss and beside else "–"
            size = count_text(study.parameters(run.size))
            begin = "dense weights" if run.start else "scratch"
            rows.append((run.size, size, begin, run.backend, f"{run.rate:g}", f"{loss:.4f}" if loss else "–", ratio))
        text.append(f"{part}\n" + plain_table(rows, right=(1, 4, 5, 6)))
    return "\n\n".join(text) + "\n"


def pictures(study: Study, runs: list[Run]) -> None:
    """Curves of the first part; loss against bits and against light."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    scratch = [run for run in runs if run.part == "scratch" and study.dev_loss(run)]
    if scratch:
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for run in scratch:
            losses = study.losses(run)
            smooth = [
                sum(losses[max(0, i - 19) : i + 1]) / len(losses[max(0, i - 19) : i + 1]) for i in range(len(losses))
            ]
            color = f"C{list(SIZES).index(run.size)}"
            axes.plot(smooth, color=color, linestyle="-" if run.options else ":", label=f"{run.size}, {run.backend}")
        axes.set(xlabel="step", ylabel="training loss, nats a token (mean of 20 steps)", ylim=(None, 6.5))
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(study.out / "optical-scratch.png", dpi=110, bbox_inches="tight")
    for part, axis, scale in (("bits", "bits of every converter", "linear"), ("photons", "photons a MAC", "log")):
        chosen = [run for run in runs if run.part == part]
        if not chosen:
            continue
        figure, axes = pyplot.subplots(figsize=(5, 3.5))
        for index, begin in enumerate(("scratch", "dense weights")):
            points = []
            for run in (run for run in chosen if bool(run.start) == bool(index)):
                beside, loss = study.dev_loss(Run(part, run.size, (), run.start, run.rate)), study.dev_loss(run)
                options = dict(run.options)
                place = options["q_levels"].bit_length() - 1 if part == "bits" else options["photons_per_mac"]
                if loss and beside:
                    points.append((place, loss / beside))
            axes.plot(*zip(*points, strict=True), marker="o", label=f"from {begin}") if points else None
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xlabel=axis, ylabel="dev loss beside dense", xscale=scale)
        axes.legend(frameon=False, fontsize=8)
        figure.savefig(study.out / f"optical-{part}.png", dpi=110, bbox_inches="tight")


def main() -> None:
    own, settings = dict(OWN), []
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            settings.append(argument)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    runs = planned(own["parts"].split(","), own["sizes"].split(","))
    study = Study(Path(own["out"]), int(own["jobs"]), int(own["steps"]), settings)
    study.carry_out(runs)
    text = tables(study, runs)
    (study.out / "tables.txt").write_text(text)
    results = [asdict(run) | {"name": run.name, "dev_loss": study.dev_loss(run)} for run in runs]
    (study.out / "results.json").write_text(json.dumps(results, indent=1))
    pictures(study, runs)
    print(text)


if __name__ == "__main__":
    main()
