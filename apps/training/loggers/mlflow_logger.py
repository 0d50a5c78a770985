"""MLflow: the server or store that MLFLOW_TRACKING_URI names, or its own default; offline, OUTPUT_DIR/mlflow.db."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from apps.training.loggers._base import Run, RunLogger, flat

FILE = "mlflow.db"  # `mlflow ui --backend-store-uri sqlite:///OUTPUT_DIR/mlflow.db`
RUN_ID = "substrate.run_id"
MAX_PARAMS, MAX_METRICS = 100, 1000  # of one request


class MlflowLogger(RunLogger):
    """One run in the experiment called like the project. MLflow chooses ids itself: ours is a tag, and found by it."""

    package = "mlflow"

    def __init__(self, run: Run) -> None:
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.metric = Metric
        here = f"sqlite:///{(run.folder / FILE).resolve()}"
        self.client = MlflowClient(tracking_uri=here if run.offline else None)
        experiment = self.client.get_experiment_by_name(run.project)
        number = self.client.create_experiment(run.project) if experiment is None else experiment.experiment_id
        known = self._known(number, run.run_id) if run.resumed_step else None
        if known is not None:
            self.id = known
            self.client.update_run(self.id, status="RUNNING")
            return
        tags = {RUN_ID: run.run_id} | dict.fromkeys(run.tags, "true")
        self.id = self.client.create_run(number, tags=tags, run_name=run.name).info.run_id
        params = [Param(name, str(value)[:6000]) for name, value in flat(run.settings).items()]
        for start in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.id, params=params[start : start + MAX_PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.id, metrics=metrics[start : start + MAX_METRICS])

    def close(self, *, failed: bool) -> None:
        self.client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")

    def _known(self, experiment: str, run_id: str) -> str | None:
        """MLflow's id of the run that has ours."""
        found: list[Any] = self.client.search_runs([experiment], f"tags.`{RUN_ID}` = '{run_id}'", max_results=1)
        return found[0].info.run_id if found else None
