"""The launchers found on this machine, and what a job started by one of them left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

LOOP = Path(__file__).with_name("loop.py")
BESIDE_PYTHON = Path(sys.executable).parent


def find_openmpi() -> str | None:
    for name in ("mpirun.openmpi", "orterun", "mpirun"):
        found = shutil.which(name, path=os.environ["PATH"])
        if found and "Open MPI" in subprocess.run([found, "--version"], capture_output=True, text=True).stdout:
            return found
    return None


def command(launcher: str, workers: int, python: str = sys.executable) -> list[str]:
    """The words before the program's; skips the test where the launcher is not installed."""
    if launcher == "mpich":
        return [str(BESIDE_PYTHON / "mpirun"), "-np", str(workers), python]
    if launcher == "torchrun":
        run = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(workers)]
        return run if python == sys.executable else [*run, "--no-python", python]
    openmpi = find_openmpi()
    if openmpi is None:
        pytest.skip("no Open MPI on PATH")
    return [openmpi, "--oversubscribe", "--bind-to", "none", "-np", str(workers), python]


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float

    @property
    def errors(self) -> list[str]:
        """Lines of ours on stderr; launchers have a word of their own."""
        return [line for line in self.err.splitlines() if line.startswith("error: ") or line == "interrupted"]


def start(
    launcher: str, *arguments: str, workers: int = 2, python: str = sys.executable, **environ: str
) -> subprocess.Popen[str]:
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return start_words([*command(launcher, workers, python), str(LOOP), *arguments], allowed | environ)


def start_words(words: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, env=os.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    )


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Ended:
    """Wait for the job; one that hangs is killed as a whole."""
    begin = time.monotonic()
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"the job hung\n{out}\n{err}")
    return Ended(process.returncode, out, err, time.monotonic() - begin)


def run(launcher: str, *arguments: str, workers: int = 2, python: str = sys.executable, **environ: str) -> Ended:
    return finish(start(launcher, *arguments, workers=workers, python=python, **environ))
