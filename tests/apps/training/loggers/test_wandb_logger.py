"""What W&B is told; with the package installed, what an offline run of its own leaves."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apps.training.loggers.wandb_logger import WandbLogger
from tests.apps.training.loggers.runs import a_run


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exit_code: int | None = None

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert step is not None
        self.logged.append((step, data))

    def finish(self, exit_code: int | None = None) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The functions of the package that are called, with its own signatures."""
    fake = SimpleNamespace(run=FakeRun(), given={}, Settings=lambda **settings: settings)

    def init(
        *, project: str, name: str, id: str, tags: list[str], dir: str, config: dict[str, Any], **others: Any
    ) -> FakeRun:
        fake.given = {"project": project, "name": name, "id": id, "tags": tags, "dir": dir, "config": config} | others
        return fake.run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_it_is_told_what_run_this_is_and_every_number(wandb: SimpleNamespace, tmp_path: Path) -> None:
    run = a_run(tmp_path)
    logger = WandbLogger(run)
    logger.log(1, {"loss": 3.0})
    logger.log(2, {"loss": 2.0})
    logger.close(failed=False)
    assert wandb.given["project"] == "house"
    assert (wandb.given["name"], wandb.given["id"], wandb.given["tags"]) == ("first", "abcd1234", ["small", "cpu"])
    assert (wandb.given["dir"], wandb.given["mode"]) == (str(tmp_path), "offline")
    assert wandb.given["config"] == run.settings
    assert wandb.run.logged == [(1, {"loss": 3.0}), (2, {"loss": 2.0})]
    assert wandb.run.exit_code == 0


def test_with_its_server_a_run_goes_on_under_its_id(wandb: SimpleNamespace, tmp_path: Path) -> None:
    WandbLogger(a_run(tmp_path, offline=False, resumed_step=5)).close(failed=True)
    assert (wandb.given["mode"], wandb.given["resume"]) == (None, "allow")
    assert wandb.run.exit_code == 1


@pytest.mark.filterwarnings("default")  # what it warns of is its own
def test_the_package_itself_writes_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    logger = WandbLogger(a_run(tmp_path))
    logger.log(1, {"house_loss": 3.0})
    logger.close(failed=False)
    (file,) = (tmp_path / "wandb").glob("offline-run-*-abcd1234/run-abcd1234.wandb")
    assert b"house_loss" in file.read_bytes()
