"""A run killed at random moments, again and again, against the same run left alone: equal losses, weights and state.

    python benchmarks/kill_resume.py kills=20 checkpoint.config_name=demo training.batch_size=2 training.max_steps=200
    python benchmarks/kill_resume.py kills=5 launcher="mpirun -np 2" compile.target=eager …

Settings are train_llm.py's, and kills=20, kill_seed=0, launcher="" of this script's own. Every other kill falls into
the writing of a checkpoint, the others anywhere in a step; of several workers a random one is killed. A line for each.
"""

import csv
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.training.checkpointing.manifest import checkpoint_folders, flaw  # noqa: E402
from apps.training.reporting.output_folder import COLUMNS  # noqa: E402

CLOCK = {"Time per Step", "Tokens per Second"}  # columns that may differ


def main() -> None:
    own = {"kills": "20", "kill_seed": "0", "launcher": ""}
    settings = []
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            settings.append(argument)
    with tempfile.TemporaryDirectory() as folder:
        prefix = shlex.split(own["launcher"])
        whole = run_whole(prefix, settings, Path(folder, "whole"))
        print(json.dumps({"uninterrupted": True, "steps": len(rows(whole))}), flush=True)
        killed = Path(folder, "killed")
        for kill in run_killed(
            prefix, settings, killed, kills=int(own["kills"]), seed=int(own["kill_seed"]), whole=whole
        ):
            print(json.dumps(kill), flush=True)
        print(json.dumps(compare(whole, killed)), flush=True)


def run_whole(prefix: Sequence[str], settings: Sequence[str], output: Path) -> Path:
    """The run without a kill, saving as the killed one does; its folder."""
    process = start(prefix, settings, output)
    if process.wait() != 0:
        raise SystemExit(f"the uninterrupted run failed:\n{log(output).read_text()}")
    return output


def run_killed(
    prefix: Sequence[str], settings: Sequence[str], output: Path, *, kills: int, seed: int, whole: Path
) -> Iterator[dict[str, object]]:
    """Start the run, kill it, start it again …, and let it end after the last kill. What each kill met, as it comes."""
    chance, total = random.Random(seed), len(rows(whole))
    for number in range(kills):
        process = start(prefix, settings, output)
        # Any distance, and on average such that the last kill comes near the end.
        newest = newest_step(output)
        target = newest + chance.randint(1, max(1, 2 * (total - newest) // (kills - number + 1)))
        saving = number % 2 == 1
        try:
            wait_until(partial(has_row, output, target, set(rows_text(output))), process, output)
            if saving:
                wait_until(lambda: any(checkpoints(output).glob(".tmp-iter_*")), process, output)
            time.sleep(chance.uniform(0, 0.02 if saving else 0.1))
            ended = process.poll() is not None
            kill_one(process, chance)
            process.wait(60)
        finally:
            process.kill()
        kill = {"kill": number + 1, "meant": "saving" if saving else "step", "after_step": len(rows(output))}
        kill |= {"left_half_done": sorted(path.name for path in checkpoints(output).glob(".tmp-*"))}
        kill |= {"goes_on_after": newest_step(output), "ended_before": ended}
        flaws = {path.name: flaw(path) for path in checkpoint_folders(checkpoints(output)) if flaw(path)}
        if flaws:
            raise SystemExit(f"a checkpoint is under its name and not complete: {flaws}")
        yield kill
    if start(prefix, settings, output).wait() != 0:
        raise SystemExit(f"the last start failed:\n{log(output).read_text()}")


def compare(whole: Path, killed: Path) -> dict[str, object]:
    """What is equal, bit for bit; SystemExit where anything differs."""
    ours, theirs = rows(killed), rows(whole)
    steps = [row["Step"] for row in ours]
    facts = {
        "csv_without_gap_or_duplicate": steps == [str(step + 1) for step in range(len(theirs))],
        "losses_equal": [without_clock(row) for row in ours] == [without_clock(row) for row in theirs],
        "weights_equal": hashes(whole, "model*") == hashes(killed, "model*"),
    }
    last = [next(iter(checkpoint_folders(checkpoints(folder)))) for folder in (whole, killed)]
    facts["optimizer_and_buffers_equal"] = own_state(last[0]) == own_state(last[1])
    if not all(facts.values()):
        raise SystemExit(f"not the same run: {facts}")
    return facts


def start(prefix: Sequence[str], settings: Sequence[str], output: Path) -> subprocess.Popen[bytes]:
    command = [*prefix, sys.executable, str(ROOT / "apps/train_llm.py"), "command=run", "checkpoint.save=true"]
    command += ["training.resume=auto", "checkpoint.keep=2", f"training.output_dir={output}", *settings]
    output.parent.mkdir(parents=True, exist_ok=True)
    with log(output).open("wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)


def log(output: Path) -> Path:
    return output.with_suffix(".log")


def checkpoints(output: Path) -> Path:
    return output / "checkpoints"


def newest_step(output: Path) -> int:
    return max((int(path.name.removeprefix("iter_")) for path in checkpoint_folders(checkpoints(output))), default=0)


def rows(output: Path) -> list[dict[str, str]]:
    """The steps in the CSV, but for a last line that is cut short."""
    return list(csv.DictReader(rows_text(output)))


def rows_text(output: Path) -> list[str]:
    """The whole lines of the CSV."""
    path = output / "per_step_metrics.csv"
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def has_row(output: Path, step: int, before: set[str]) -> bool:
    """Whether the running process itself wrote the row of `step` or a later one; `before`: lines that were there."""
    new = [line for line in rows_text(output)[1:] if line not in before]
    return any(int(row[COLUMNS.index("Step")]) >= step for row in csv.reader(new))


def without_clock(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if name not in CLOCK}


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    """Name → sha256 of the files' bytes."""
    found = sorted(folder.glob(f"{pattern}.safetensors"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def own_state(checkpoint: Path) -> dict[str, str]:
    """File and tensor → sha256 of the optimizer's state and of the backends', of all workers."""
    import torch
    from safetensors.torch import load_file

    return {
        f"{path.name} {name}": hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for path in sorted(checkpoint.glob("optimizer-*.safetensors"))
        for name, tensor in load_file(path).items()
        if not name.startswith("rng.")  # nobody draws from PyTorch's own generators, which begin anywhere
    }


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[bytes], output: Path) -> None:
    while not happened():
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"the run ended by itself:\n{log(output).read_text()}")
            return
        time.sleep(0.001)


def kill_one(process: subprocess.Popen[bytes], chance: random.Random) -> None:
    """SIGKILL for the run; of a launcher's workers, for one."""
    workers = [pid for pid in descendants(process.pid) if b"train_llm.py" in command_line(pid)]
    with suppress(ProcessLookupError):  # it was faster
        os.kill(chance.choice(workers or [process.pid]), signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        children += [int(child) for child in task.read_text().split()]
    return [each for child in children for each in (child, *descendants(child))]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


if __name__ == "__main__":
    main()
