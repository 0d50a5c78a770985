"""What MLflow is told; with the package installed, what it finds in its own store."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from apps.training.loggers.mlflow_logger import MlflowLogger
from tests.apps.training.loggers.runs import a_run


class FakeClient:
    """The store of an MLflow server, and the part of its client that is called."""

    experiments: dict[str, str]
    runs: list[SimpleNamespace]

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.tracking_uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        return SimpleNamespace(experiment_id=self.experiments[name]) if name in self.experiments else None

    def create_experiment(self, name: str) -> str:
        self.experiments[name] = str(len(self.experiments) + 1)
        return self.experiments[name]

    def create_run(self, experiment_id: str, tags: dict[str, str], run_name: str) -> SimpleNamespace:
        info = SimpleNamespace(run_id=f"their-{len(self.runs)}")
        run = SimpleNamespace(info=info, tags=tags, name=run_name, metrics=[], params={}, status="RUNNING")
        self.runs.append(run)
        return run

    def search_runs(self, experiment_ids: list[str], filter_string: str, max_results: int) -> list[SimpleNamespace]:
        name, _, value = filter_string.removeprefix("tags.").partition(" = ")
        return [run for run in self.runs if run.tags.get(name.strip("`")) == value.strip("'")][:max_results]

    def update_run(self, run_id: str, status: str) -> None:
        self._run(run_id).status = status

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100  # what a server takes
        assert len(metrics) <= 1000
        self._run(run_id).metrics += [(each.key, each.value, each.step) for each in metrics]
        self._run(run_id).params |= {each.key: each.value for each in params}

    def set_terminated(self, run_id: str, status: str) -> None:
        self._run(run_id).status = status

    def _run(self, run_id: str) -> SimpleNamespace:
        return next(run for run in self.runs if run.info.run_id == run_id)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> type[FakeClient]:
    entities, tracking = ModuleType("mlflow.entities"), ModuleType("mlflow.tracking")

    class Client(FakeClient):
        experiments, runs = {}, []

    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)  # type: ignore[attr-defined]
    entities.Param = lambda key, value: SimpleNamespace(key=key, value=value)  # type: ignore[attr-defined]
    tracking.MlflowClient = Client  # type: ignore[attr-defined]
    for module in (ModuleType("mlflow"), entities, tracking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return Client


def test_a_run_with_its_tags_settings_and_numbers(store: type[FakeClient], tmp_path: Path) -> None:
    logger = MlflowLogger(a_run(tmp_path))
    logger.log(1, {"loss": 3.0, "lr": 0.1})
    logger.close(failed=False)
    (run,) = store.runs
    assert (run.name, run.status) == ("first", "FINISHED")
    assert run.tags == {"substrate.run_id": "abcd1234", "small": "true", "cpu": "true"}
    assert run.params == {"optimizer.name": "adamw", "optimizer.lr": "0.1", "command": "run"}
    assert run.metrics == [("loss", 3.0, 1), ("lr", 0.1, 1)]


def test_many_settings_and_numbers_come_in_requests_a_server_takes(store: type[FakeClient], tmp_path: Path) -> None:
    logger = MlflowLogger(a_run(tmp_path, settings={f"key{number}": number for number in range(250)}))
    logger.log(1, {f"norm{number}": float(number) for number in range(2500)})
    assert (len(store.runs[0].params), len(store.runs[0].metrics)) == (250, 2500)


def test_a_resumed_run_goes_on_in_the_run_with_its_id(store: type[FakeClient], tmp_path: Path) -> None:
    for changes in ({}, {"run_id": "other"}, {"resumed_step": 1}):
        logger = MlflowLogger(a_run(tmp_path, **changes))
        logger.log(1 + changes.get("resumed_step", 0), {"loss": 1.0})
        logger.close(failed="resumed_step" in changes)
    assert [len(run.metrics) for run in store.runs] == [2, 1]
    assert store.runs[0].status == "FAILED"
    assert store.experiments == {"house": "1"}


@pytest.mark.filterwarnings("default")  # what it warns of is its own
def test_the_package_itself_finds_the_run_in_its_store(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("alembic")  # mlflow-skinny has no store of its own
    from mlflow.tracking import MlflowClient

    for resumed in (0, 1):
        logger = MlflowLogger(a_run(tmp_path, resumed_step=resumed))
        logger.log(1 + resumed, {"loss": 3.0 - resumed})
        logger.close(failed=False)
    client = MlflowClient(tracking_uri=f"sqlite:///{(tmp_path / 'mlflow.db').resolve()}")
    (run,) = client.search_runs([client.get_experiment_by_name("house").experiment_id])
    assert run.data.params["optimizer.lr"] == "0.1"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(1, 3.0), (2, 2.0)]
