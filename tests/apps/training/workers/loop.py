"""A stand-in for the trainer: opens workers, sums in a loop, and in step 10 worker AT gets into trouble HOW.

mpirun -np 2 python loop.py HOW AT [STEPS]
"""

import os
import signal
import sys
import time
from collections.abc import Sequence

from apps.training.cli import INTERRUPTED, run_main
from apps.training.workers.launch import find_launch
from backends.errors import UserError

TIMEOUT, TROUBLE = 3.5, 10


def get_into_trouble(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "stuck":
        time.sleep(1000)
    if how == "bug":
        raise ZeroDivisionError("a bug")
    if how == "mistake":
        raise UserError("No such file: rows.h5.")


def program(argv: Sequence[str]) -> int:
    how, at, steps = argv[0], int(argv[1]), int(argv[2]) if len(argv) > 2 else 12
    launch = find_launch()
    if how == "bad-setting" or (how == "bad-setting-of-one" and launch.rank == at):
        raise UserError("Unknown setting.")

    import torch

    from apps.training.interrupt import StopRequest
    from apps.training.workers.group import open_workers

    with (
        open_workers(launch, device_type="cpu", timeout=TIMEOUT, setting="its.timeout") as workers,
        StopRequest() as stop,
    ):
        print(f"rank {workers.rank} prints", flush=True)
        print(f"rank {workers.rank} warns", file=sys.stderr, flush=True)
        print("text:", workers.broadcast_text(f"of rank {workers.rank}"), flush=True)
        total, step, stopped = 0, 0, 0
        while step < steps and not stopped:
            step += 1
            workers.doing(f"reading rows of step {step}")
            time.sleep(0.02 if step != TROUBLE else 0.6)  # a beat goes out in between
            if step == TROUBLE and workers.rank == at % workers.world_size:
                get_into_trouble(how)
            if step == TROUBLE and how == "mistake-of-all":
                raise UserError("No such folder: data.")
            workers.waiting(f"sums of step {step}")
            count, stopped = workers.sum_counts(2**60 // workers.world_size, int(stop.requested))
            total += int(workers.sum_(torch.full((3,), float(workers.rank + 1)))[1])
        workers.doing("saving")
        if workers.is_first:
            time.sleep(0.3)
            print(f"count {count}, total {total}, steps {step}, saved", flush=True)
    return INTERRUPTED if stopped else 0


if __name__ == "__main__":
    sys.exit(run_main(program, many_workers=True))
