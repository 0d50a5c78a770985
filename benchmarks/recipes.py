"""Every optimizer at its best learning rate of a small sweep, on the corpus every machine has: a table and one picture.

    python benchmarks/recipes.py out=outputs/recipes jobs=12 model.dtype=bfloat16
    python benchmarks/recipes.py out=outputs/recipes jobs=1 models=demo recipes="adamw;muon" rates=2 steps=100

Settings are train_llm.py's, and those of OWN: `rates=2` tries the first two of each recipe's, `steps=100` replaces the
steps of MODELS, recipes stand between semicolons. A model's runs have the same data, order, seed and schedule. One
sweep (apps/sweep.py) for each model and recipe, `jobs` of them at a time; what is done is not done again, so a stopped
study goes on; `report=only` shows what is there. `out` gets recipes.md, recipes.png, recipes.json, and a folder with a
log for each sweep.
"""

import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.sweeping.results import Result, read_result  # noqa: E402

# settings that all of a model's runs share
MODELS = {
    "demo": ["model.max_seq_length=256", "training.batch_size=8", "training.max_steps=500"],
    "clm-60m": [
        "model.max_seq_length=256",
        "training.batch_size=16",
        "training.max_steps=300",
        "compile.head_chunks=4",  # many runs share one device's memory
    ],
}
SHARED = ["schedule.warmup_steps=40", "logging.every=100", "training.evaluate=true"]
# the rates that are tried, about a factor of three apart, the middle ones first, and what else is set
RECIPES: dict[str, tuple[list[str], list[str]]] = {
    "adamw": (["1e-3", "3e-3", "3e-4", "1e-2"], []),
    "adam": (["1e-3", "3e-3", "3e-4", "1e-2"], []),
    "nadam": (["1e-3", "3e-3", "3e-4", "1e-2"], []),
    "rmsprop": (["3e-4", "1e-3", "1e-4", "3e-3"], []),
    "sgdm": (["0.3", "1.0", "0.1", "3.0"], []),
    "normalized_sgdm": (["0.1", "0.3", "0.03", "1.0"], []),
    "lion": (["3e-4", "1e-3", "1e-4", "3e-3"], []),
    "adafactor": (["1e-2", "3e-2", "3e-3", "1e-1"], []),
    "muon": (["0.01", "0.03", "0.003", "0.1"], []),
    "muon, adamw_lr=3e-3": (["0.01", "0.03", "0.003", "0.1"], ["optimizer.adamw_lr=3e-3"]),
    "mango": (["0.01", "0.03", "0.003", "0.1"], []),
}
OWN = {
    "out": "outputs/recipes",
    "jobs": "2",
    "models": ",".join(MODELS),
    "recipes": ";".join(RECIPES),
    "rates": "4",
    "steps": "",
    "report": "after",
}
COLOURS = ("#1f5fa8", "#9db7d9", "#0f8b8d", "#2e8b57", "#6b7280", "#8d5524", "#e08e0b", "#7b4fa3", "#d1495b", "#111111")
AVERAGED = 20  # steps whose mean a curve shows


@dataclass(frozen=True)
class Try:
    """One run of a sweep and what came of it; None where it failed."""

    rate: str
    result: Result | None

    @property
    def loss(self) -> float:
        """On held-out text; infinite for a run that did not get there."""
        found = self.result.dev_loss if self.result else None
        return found if found is not None and math.isfinite(found) else math.inf


class Study:
    """Carries out the sweeps in a folder, some at a time."""

    def __init__(self, own: dict[str, str], settings: list[str]) -> None:
        self.out, self.settings, self.steps = Path(own["out"]).resolve(), settings, own["steps"]
        self.jobs, self.count = int(own["jobs"]), int(own["rates"])
        self.models, self.recipes = own["models"].split(","), own["recipes"].split(";")

    def program(self, log: str, script: str, *arguments: str, at_once: int = 1) -> None:
        """Run a script to its end, one of `at_once` that share the cores."""
        path = self.out / "logs" / f"{log}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        # else every GPU compile has a pool of as many processes as there are cores
        threads = {"TORCHINDUCTOR_COMPILE_THREADS": str(max(1, len(os.sched_getaffinity(0)) // at_once))}
        with path.open("w") as file:
            command = [sys.executable, script, *arguments]
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ | threads)
        outcome = "done  " if done.returncode == 0 else "FAILED"
        print(f"{outcome} {log}, {time.monotonic() - started:.0f} s", flush=True)

    def arguments(self, model: str, recipe: str) -> list[str]:
        given = [f"checkpoint.config_name={model}", f"optimizer={recipe.split(',')[0]}", *MODELS[model], *SHARED]
        given += [
            *RECIPES[recipe][1],
            f"training.dataset={self.out}/dataset",
            f"compile.output_dir={self.out}/artifacts",
        ]
        given += [*self.settings, *([f"training.max_steps={self.steps}"] if self.steps else [])]
        return [f"{key}={value}" for key, value in dict(each.split("=", 1) for each in given).items()]

    def carry_out(self) -> None:
        with ThreadPoolExecutor(self.jobs) as pool:
            # forward and backward are the same code for every optimizer: the first leaves them in the compiler's cache
            first = [pool.submit(self.prepare), *(pool.submit(self.compile_first, model) for model in self.models)]
            for each in first:
                each.result()
            pairs = [(model, recipe) for model in reversed(self.models) for recipe in self.recipes]
            list(pool.map(lambda pair: self.sweep(*pair), pairs))

    def prepare(self) -> None:
        if not (self.out / "dataset").exists():
            data = [f"output_dir={self.out}/dataset", "max_seq_length=256", "vocab_size=4096"]
            self.program("prepare", "apps/prepare_data.py", *data)

    def compile_first(self, model: str) -> None:
        if not list((self.out / "artifacts").glob(f"{model}-*")):
            given = self.arguments(model, self.recipes[0])
            self.program(f"compile-{model}", "apps/train_llm.py", "command=compile", *given, at_once=len(self.models))

    def sweep(self, model: str, recipe: str) -> None:
        axis = json.dumps({"optimizer.lr": [float(rate) for rate in RECIPES[recipe][0][: self.count]]})
        given = [f"sweep={axis}", f"output_dir={self.folder(model, recipe)}", *self.arguments(model, recipe)]
        self.program(f"{model}-{plain(recipe)}", "apps/sweep.py", *given, at_once=self.jobs)

    def folder(self, model: str, recipe: str) -> Path:
        return self.out / model / plain(recipe)

    def tries(self, model: str, recipe: str) -> list[Try]:
        """The runs of one sweep, the lowest rate first."""
        folders = {float(path.name.removeprefix("lr=")): path for path in self.folder(model, recipe).glob("lr=*")}
        rates = sorted(RECIPES[recipe][0][: self.count], key=float)
        return [Try(rate, read_result(folders[float(rate)])) for rate in rates if float(rate) in folders]

    def best(self, model: str, recipe: str) -> Try | None:
        return min(self.tries(model, recipe), key=lambda each: each.loss, default=None)


def plain(recipe: str) -> str:
    return recipe.replace(", ", "-").replace("=", "-")


def table(study: Study, model: str) -> str:
    """Markdown: a recipe a row, the lowest loss first; a best rate at an end of those tried has a star."""
    bests = {recipe: best for recipe in study.recipes if (best := study.best(model, recipe)) is not None}
    reference = bests["adamw"].loss if "adamw" in bests else math.nan
    lines = ["| optimizer | best rate | dev loss | beside adamw | dev loss at each rate |", "|---|---|---|---|---|"]
    for recipe, best in sorted(bests.items(), key=lambda pair: pair[1].loss):
        tries = study.tries(model, recipe)
        star = "*" if best.rate in (tries[0].rate, tries[-1].rate) else ""
        each = ", ".join(f"{one.rate}: {shown(one.loss)}" for one in tries)
        beside = best.loss - reference
        cells = [
            recipe,
            f"{best.rate}{star}",
            shown(best.loss),
            f"{beside:+.3f}" if math.isfinite(beside) else "–",
            each,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(loss: float) -> str:
    return f"{loss:.3f}" if math.isfinite(loss) else "–"


def picture(study: Study, path: Path) -> None:
    """The training loss of each optimizer's best run, a panel for each model."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(study.models), figsize=(6.5 * len(study.models), 4.5), squeeze=False)
    for model, axes in zip(study.models, panels[0], strict=True):
        lowest, highest = math.inf, 0.0
        for number, name in enumerate(study.recipes):
            best = study.best(model, name)
            if best is None or best.result is None:
                continue
            losses = best.result.losses
            windows = [losses[max(0, end - AVERAGED) : end] for end in range(1, len(losses) + 1)]
            smooth = [sum(window) / len(window) for window in windows]
            lowest, highest = min(lowest, *smooth), max(highest, smooth[len(smooth) // 10])
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--")[number // len(COLOURS) % 2]}
            axes.plot(range(1, len(smooth) + 1), smooth, **style, linewidth=1.4, label=f"{name}, {best.rate}")
        if lowest < highest:
            axes.set_ylim(lowest - 0.05 * (highest - lowest), highest)
        axes.set(title=model, xlabel="step", ylabel=f"training loss, nats a token (mean of {AVERAGED} steps)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


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
    if own["report"] != "only":
        study.carry_out()
    text = "\n\n".join(f"**{model}**\n\n{table(study, model)}" for model in study.models) + "\n"
    (study.out / "recipes.md").write_text(text)
    results = {
        model: {name: {each.rate: each.loss for each in study.tries(model, name)} for name in study.recipes}
        for model in study.models
    }
    (study.out / "recipes.json").write_text(json.dumps(results, indent=1))
    picture(study, study.out / "recipes.png")
    print(text)


if __name__ == "__main__":
    main()
