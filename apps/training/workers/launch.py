"""Which worker of how many this process is: what torchrun, Open MPI, MPICH or SLURM put into its environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from backends.errors import UserError

# launcher: (rank, world size, local rank, local world size). The first of which rank or size is set counts.
# `srun` sets the step's number of tasks; a batch script that starts python without srun has SLURM_NTASKS only.
VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "mpich": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
}


@dataclass(frozen=True)
class Launch:
    """This process among the workers. `local_*`: among those on the same host."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    launcher: str = "none"

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def on_one_host(self) -> bool:
        return self.local_world_size == self.world_size


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """The launch that the environment tells of; one worker when it tells of none.

    UserError when variables are missing, are no numbers, contradict themselves or one another.
    """
    found = [launcher for launcher, names in VARIABLES.items() if _is_set(environ, launcher, names)]
    if not found:
        return Launch()
    launch = _read(environ, found[0])
    if launch.launcher != "torchrun" or "TORCHELASTIC_RUN_ID" in environ:
        return launch  # whatever started the launcher itself, one on each host, has left its variables too
    for other in found[1:]:
        theirs = _read(environ, other)
        if (theirs.rank, theirs.world_size) != (launch.rank, launch.world_size):
            raise UserError(
                f"RANK={launch.rank} WORLD_SIZE={launch.world_size} contradict "
                f"{VARIABLES[other][0]}={theirs.rank} {VARIABLES[other][1]}={theirs.world_size}. "
                "Unset RANK and WORLD_SIZE, or start the workers with torchrun."
            )
    return launch


def slurm_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Where the workers of a job step meet when MASTER_ADDR is not given: its first host, a port made of its number."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    # "gpu[07-09,12],login1" → "gpu07": up to the first comma or dash inside the first bracket
    first = re.match(r"([^,\[]+)(?:\[([^,\]-]+)[^\]]*\]([^,\[]*))?", nodes)
    host = "".join(part or "" for part in first.groups()) if first else nodes
    job, step = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return host, 20_000 + (job * 31 + step) % 10_000


def _is_set(environ: Mapping[str, str], launcher: str, names: tuple[str, ...]) -> bool:
    return names[1] in environ if launcher == "slurm" else bool({names[0], names[1]} & environ.keys())


def _read(environ: Mapping[str, str], launcher: str) -> Launch:
    rank_name, size_name, local_name, local_size_name = VARIABLES[launcher]
    rank, size = _number(environ, rank_name, size_name), _number(environ, size_name, rank_name)
    if not 0 <= rank < size:
        raise UserError(f"{rank_name}={rank} with {size_name}={size}. Expected a rank of 0 to {size_name} - 1.")
    local = _number(environ, local_name, rank_name) if local_name in environ else rank
    if launcher == "slurm":
        local_size = _slurm_tasks(environ) or size
    else:
        local_size = _number(environ, local_size_name, local_name) if local_size_name in environ else size
    if not 0 <= local < local_size <= size:
        raise UserError(
            f"{local_name}={local} with {local_size_name}={local_size}, {size_name}={size}. "
            "Expected a local rank below the local size, and that at most the size."
        )
    if launcher == "torchrun" and size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= environ.keys():
        raise UserError(
            f"{rank_name}={rank} {size_name}={size} without MASTER_ADDR and MASTER_PORT. Start the workers with "
            "torchrun or mpirun, set both, or unset RANK and WORLD_SIZE for one worker."
        )
    return Launch(rank, size, local, local_size, launcher)


def _number(environ: Mapping[str, str], name: str, partner: str) -> int:
    if name not in environ:
        raise UserError(
            f"{partner}={environ[partner]} without {name}. Expected both, as a launcher sets them, or none."
        )
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(f"{name}={environ[name]} in the environment. Expected a whole number.") from None


def _slurm_tasks(environ: Mapping[str, str]) -> int | None:
    """Tasks on this host, of "4(x2),3": 4 on each of two hosts, then 3; None when that is not told."""
    tasks: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")):
        tasks += [int(count)] * int(times or 1)
    node = int(environ.get("SLURM_NODEID", "0"))
    return tasks[node] if node < len(tasks) else None


def own_gpu(launch: Launch, environment: MutableMapping[str, str] = os.environ) -> Launch:
    """Let this worker see its own GPU as the first; returns `launch`. Call it before anything looks at the GPUs.

    An artifact's code is for the first GPU a process sees. The host's other workers' GPUs follow: what a process does
    not see it cannot fetch by a copy engine. A launcher that has shared them out is left alone. Raises UserError when
    the variable CUDA_VISIBLE_DEVICES lists fewer GPUs than the host has workers.
    """
    if launch.local_world_size == 1:
        return launch
    given = environment.get("CUDA_VISIBLE_DEVICES")
    visible = [str(number) for number in range(launch.local_world_size)] if given is None else given.split(",")
    if len(visible) > 1:
        if len(visible) < launch.local_world_size:
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={given} has {len(visible)} GPUs for {launch.local_world_size} workers of this "
                "host. Start fewer workers on it, list more GPUs, or use compile.arch=cpu."
            )
        ours = visible[: launch.local_world_size]
        own = ours.pop(launch.local_rank)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join([own, *ours])
    return launch
