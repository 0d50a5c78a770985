"""Where workers meet: addresses that other hosts can use, and the MPI library of the launcher."""

import os
from pathlib import Path

import pytest

from apps.training.workers.launch import Launch
from apps.training.workers.mpi import OPENMPI_LIBRARY, broadcast, openmpi_libraries
from apps.training.workers.rendezvous import mpich_line, own_hosts
from backends.errors import UserError


def test_the_address_that_was_given_comes_first_and_loopback_is_for_lonely_hosts_only() -> None:
    hosts = own_hosts("192.0.2.7")
    assert hosts[0] == "192.0.2.7"
    assert not [host for host in hosts if host.startswith("127.")]
    assert own_hosts(None)


@pytest.mark.parametrize("number", ["", "x", "987654"])
def test_mpich_s_line_is_held_only_when_it_is_there(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_FD", number)
    assert mpich_line() == []
    reading, writing = os.pipe()
    monkeypatch.setenv("PMI_FD", str(writing))
    assert mpich_line() == [writing]
    os.close(reading)
    os.close(writing)


def test_open_mpis_library_is_looked_for_where_the_launcher_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "lib64" / OPENMPI_LIBRARY
    library.parent.mkdir()
    library.touch()
    monkeypatch.setenv("OPAL_PREFIX", str(tmp_path))
    found = openmpi_libraries()
    assert found[0] == str(library)
    assert found[-1] == OPENMPI_LIBRARY  # at last wherever the loader finds one


def test_without_mpi4py_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(UserError, match="pip install mpi4py mpich.*MASTER_ADDR"):
        broadcast(Launch(0, 2, 0, 2, "mpich"), "x")
