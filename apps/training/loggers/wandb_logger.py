"""Weights & Biases, with or without its server: WANDB_MODE=offline or logging.offline=true, and `wandb sync` later."""

from __future__ import annotations

from collections.abc import Mapping

from apps.training.loggers._base import Run, RunLogger


class WandbLogger(RunLogger):
    """One W&B run. A resumed run goes on in the same one, by its id."""

    package = "wandb"

    def __init__(self, run: Run) -> None:
        import wandb

        self.run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            tags=list(run.tags),
            dir=str(run.folder),
            config=dict(run.settings),
            mode="offline" if run.offline else None,  # None: WANDB_MODE, or online
            resume=None if run.offline else "allow",
            # our lines are ours; a terminal is asked for a login, and training waits for neither
            settings=wandb.Settings(console="off", silent=True, login_timeout=30),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))
