"""MPI, for as long as workers need it: to tell everybody where worker 0 is. The sums are gloo's and NCCL's."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from apps.training.workers.launch import VARIABLES, Launch
from backends.errors import UserError

OPENMPI_LIBRARY = "libmpi.so.40"  # of Open MPI 4 and 5


class OfEveryWorker(UserError):
    """A mistake that every worker finds by itself before it can reach the others: worker 0 says it."""


def broadcast(launch: Launch, message: Any) -> Any:
    """Worker 0's `message`. MPI is initialised and finalised here: nothing of it may spin or hang later on.

    UserError when mpi4py or the launcher's MPI library is missing, or when it is another's.
    """
    if launch.launcher == "openmpi":
        os.environ.setdefault("MPI4PY_MPIABI", "openmpi")
        os.environ.setdefault("MPI4PY_LIBMPI", os.pathsep.join(openmpi_libraries()))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a suspicious environment: what is wrong with it is checked below
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        kind = OfEveryWorker if launch.on_one_host else UserError
        raise kind(
            f"Workers of {launch.launcher}'s mpirun meet through mpi4py, which cannot be used: "
            f"{str(error).splitlines()[0]}. Install it (pip install mpi4py mpich), use this environment's mpirun, "
            "or set MASTER_ADDR and MASTER_PORT."
        ) from error
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    if (rank, size) != (launch.rank, launch.world_size):
        rank_name, size_name = VARIABLES[launch.launcher][:2]
        library = MPI.Get_library_version().splitlines()[0].split(",")[0].replace("\t", " ").strip("\0 ")
        MPI.Finalize()
        raise OfEveryWorker(
            f"mpirun says worker {launch.rank} of {launch.world_size} ({rank_name}, {size_name}), but mpi4py's "
            f"{library} says {rank} of {size}: they belong to different MPI installations. Use the mpirun beside this "
            f"python ({Path(sys.executable).parent / 'mpirun'}), or name the library of yours in MPI4PY_LIBMPI."
        )
    answer = world.bcast(message, root=0)
    MPI.Finalize()
    return answer


def openmpi_libraries() -> list[str]:
    """Where the library of the Open MPI that started this process may lie, the surest place first."""
    programs = [Path(f"/proc/{os.getppid()}/exe").resolve()]  # mpirun, orted or prted, unless a shell stands between
    programs += [Path(found).resolve() for name in ("orted", "prted", "ompi_info") if (found := shutil.which(name))]
    prefixes = [Path(prefix) for name in ("OPAL_PREFIX", "MPI_HOME") if (prefix := os.environ.get(name))]
    prefixes += [program.parent.parent for program in programs]
    places = [
        prefix / folder / OPENMPI_LIBRARY for prefix in prefixes for folder in ("lib", "lib64", "lib/openmpi/lib")
    ]
    return [*dict.fromkeys(str(place) for place in places if place.exists()), OPENMPI_LIBRARY]
