"""What a training run loses to each checkpoint that is written beside it, in steps, from the run's own clock.

    python benchmarks/checkpoint_cost.py checkpoint.config_name=clm-60m training.batch_size=16 training.dataset=DIR …

Settings are train_llm.py's, and saves=8, every=40 of this script's own: the run takes `every` steps between two
checkpoints. Lost is, for each checkpoint, the time of the steps from it to the next beyond as many usual steps; the
first one, which also takes the memory that all others use, stands apart. Compile the artifact first.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apps.training.reporting.output_folder import METRICS  # noqa: E402


def main() -> None:
    own = {"saves": "8", "every": "40"}
    settings = []
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        else:
            settings.append(argument)
    saves, every = int(own["saves"]), int(own["every"])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "apps/train_llm.py", "command=run", *settings]
        command += [f"training.max_steps={(saves + 2) * every}", f"training.output_dir={folder}/run"]
        command += ["checkpoint.save=true", f"checkpoint.save_steps={every}", "checkpoint.keep=1"]
        command += ["training.evaluate=false", "logging.every=1000000"]
        subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        with (Path(folder) / "run" / METRICS).open(newline="") as file:
            seconds = [float(row["Time per Step"]) for row in csv.DictReader(file)]
    usual = statistics.median(seconds[every:])
    # a step's numbers are read while the next one runs, so what a checkpoint costs lies behind its own step
    lost = [sum(seconds[step : step + every]) / usual - every for step in range(every, len(seconds) - every, every)]
    print(
        json.dumps(
            {
                "ms": round(usual * 1e3, 2),
                "saves": len(lost),
                "first_lost_steps": round(lost[0], 3),
                "lost_steps": round(statistics.median(lost[1:]), 3),
                "each": [round(one, 3) for one in lost[1:]],
            }
        )
    )


if __name__ == "__main__":
    main()
