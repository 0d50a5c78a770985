"""Two hosts in network namespaces: a cable that is pulled, a network that is slow. Needs root and `ip`."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tests.apps.training.workers.launchers import LOOP, Ended, finish, start_words
from tests.apps.training.workers.loop import TIMEOUT

ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces with a cable between them, `cable` at either end."""
    names = (f"sub{os.getpid()}a", f"sub{os.getpid()}b")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and ip")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    yield names
    for name in names:
        ip("netns", "delete", name)


def run_apart(hosts: tuple[str, str], *arguments: str, meanwhile: Callable[[], None] | None = None) -> list[Ended]:
    """One worker on each host, without a launcher that would end one when the other ends."""
    processes = []
    for rank, host in enumerate(hosts):
        environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        meeting = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "cable"}
        # A process namespace of its own too: by its absence the watch knows a worker of its own host, and kills it.
        words = ["ip", "netns", "exec", host, "unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(LOOP)]
        processes.append(start_words([*words, *arguments], environ | meeting))
    if meanwhile is not None:
        output = processes[0].stdout
        assert output is not None
        while "text:" not in output.readline():  # printed when the workers have met
            pass
        meanwhile()
    return [finish(process) for process in processes]


def test_a_pulled_cable_ends_both_sides(hosts: tuple[str, str]) -> None:
    def pull() -> None:
        nonlocal pulled
        pulled = time.monotonic()
        ip("-n", hosts[1], "link", "set", "cable", "down")

    pulled = 0.0
    first, second = run_apart(hosts, "well", "0", "4000", meanwhile=pull)
    assert time.monotonic() - pulled < TIMEOUT + 15
    assert (first.code, second.code) == (1, 1)
    (error,) = first.errors
    assert "Worker 1 of 2 (" in error
    assert "has shown no sign of life for 3.5 s" in error
    (other,) = second.errors
    assert "has lost worker 0 (10.213.7.1); at: sums of step" in other


def test_a_slow_network_is_no_failure(hosts: tuple[str, str]) -> None:
    if shutil.which("tc") is None:
        pytest.skip("needs tc")
    for host in hosts:
        begin = ["ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", "cable", "root"]
        delay, trickle = "netem delay 80ms".split(), "tbf rate 400kbit burst 4kb latency 400ms".split()
        if all(subprocess.run([*begin, *kind], capture_output=True).returncode != 0 for kind in (delay, trickle)):
            pytest.skip("the kernel has neither netem nor tbf")
    first, second = run_apart(hosts, "well", "0")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "total 36, steps 12, saved" in first.out
