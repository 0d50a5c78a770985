"""How workers find one another: through MASTER_ADDR and MASTER_PORT where they are given, through MPI otherwise."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from apps.training.workers.launch import Launch, slurm_address
from apps.training.workers.lifeline import Lifeline, machine
from apps.training.workers.mpi import broadcast

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore


@dataclass(frozen=True)
class Meeting:
    """Where the watch listens and how to prove that one belongs to the job; the store's port, where MPI was used."""

    hosts: list[str]
    watch_port: int
    token: str
    store_port: int = 0


def join(
    launch: Launch, *, timeout: float, setting: str = "", with_store: bool = True
) -> tuple[Lifeline, Store | None]:
    """Meet the other workers. Worker 0 starts the watch; the store is None when this or worker 0 needs none.

    `timeout` is in seconds, `setting` what a user gives it by. UserError when workers cannot meet: mixed MPI
    installations, no way to worker 0.
    """
    if "MASTER_ADDR" in os.environ or launch.launcher == "slurm":
        store = _given_store(launch, timeout, os.environ)
        if launch.is_first:
            watch = open_watch(launch, timeout, setting, os.environ.get("MASTER_ADDR"))
            store.set("substrate/watch", json.dumps(asdict(watch)))
        meeting = Meeting(**json.loads(store.get("substrate/watch")))
        return _lifeline(launch, meeting, timeout), store

    opened: TCPStore | None = None
    mine = None
    if launch.is_first:
        mine = open_watch(launch, timeout, setting, None)
        if with_store:
            opened = _tcp_store(mine.hosts[0], 0, launch, timeout)
            mine = Meeting(mine.hosts, mine.watch_port, mine.token, opened.port)
    answer = broadcast(launch, None if mine is None else asdict(mine))
    meeting = Meeting(**answer)
    lifeline = _lifeline(launch, meeting, timeout)
    if opened is None and with_store and meeting.store_port:
        opened = _tcp_store(lifeline.host, meeting.store_port, launch, timeout)
    return lifeline, opened


def _lifeline(launch: Launch, meeting: Meeting, timeout: float) -> Lifeline:
    addresses = [(host, meeting.watch_port) for host in meeting.hosts]
    return Lifeline(addresses, meeting.token, rank=launch.rank, timeout=timeout)


def _given_store(launch: Launch, timeout: float, environ: Mapping[str, str]) -> Store:
    """torchrun's own store, or one that worker 0 opens at the address given."""
    from torch.distributed import rendezvous

    if "MASTER_ADDR" in environ:
        url = "env://"
        os.environ.setdefault("MASTER_PORT", "29500")  # PyTorch's own choice
    else:
        url = "tcp://{}:{}".format(*slurm_address(environ))
    ways = rendezvous(url, rank=launch.rank, world_size=launch.world_size, timeout=timedelta(seconds=timeout))
    store: Store = next(iter(ways))[0]
    return store


def _tcp_store(host: str, port: int, launch: Launch, timeout: float) -> TCPStore:
    from torch.distributed import TCPStore

    return TCPStore(host, port, launch.world_size, launch.is_first, timedelta(seconds=timeout), wait_for_workers=False)


def open_watch(launch: Launch, timeout: float, setting: str, given_host: str | None) -> Meeting:
    """Start the watch beside this process: a session of its own, our stderr."""
    listener = socket.create_server(("127.0.0.1" if launch.on_one_host else "", 0), backlog=launch.world_size)
    token = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("watch.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=2,  # the real one, whatever sys.stderr is
        pass_fds=[listener.fileno(), *mpich_line()],
        start_new_session=True,
    )
    told = {
        "fd": listener.fileno(),
        "token": token,
        "world_size": launch.world_size,
        "timeout": timeout,
        "setting": setting,
        "machine": machine(),
    }
    assert process.stdin
    process.stdin.write(json.dumps(told).encode() + b"\n")
    process.stdin.flush()
    _WATCHES.append(process)
    port = listener.getsockname()[1]
    listener.close()
    return Meeting(["127.0.0.1"] if launch.on_one_host else own_hosts(given_host), port, token)


def mpich_line() -> list[int]:
    """This worker's line to MPICH's mpirun, which kills all workers when it closes.

    The watch holds it open a bit longer, so that this worker's own exit code arrives first.
    """
    number = os.environ.get("PMI_FD", "")
    try:
        os.fstat(int(number))
    except (ValueError, OSError):
        return []
    return [int(number)]


_WATCHES: list[subprocess.Popen[bytes]] = []  # its standard input stays open as long as this process lives


def own_hosts(given: str | None) -> list[str]:
    """Addresses under which other hosts may reach this one, the likeliest first."""
    hosts = [given] if given else []
    with suppress(OSError):  # a host that does not know its own name
        hosts += [str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):  # no route
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address leads out
        hosts.append(str(probe.getsockname()[0]))
    outside = [host for host in dict.fromkeys(hosts) if not host.startswith("127.")]
    return outside or ["127.0.0.1"]
