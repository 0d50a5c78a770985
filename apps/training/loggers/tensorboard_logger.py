"""Event files for TensorBoard: `tensorboard --logdir OUTPUT_DIR/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping

from apps.training.config_yaml import write_yaml
from apps.training.loggers._base import Run, RunLogger

FOLDER = "tensorboard"


class TensorBoardLogger(RunLogger):
    """Scalars by step, and the settings as text. What a killed run reported behind its checkpoint is purged."""

    package = "tensorboard"

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / FOLDER
        if not run.resumed_step:
            for old in folder.glob("events.out.tfevents.*"):  # of another run, which this one replaces
                old.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=run.resumed_step + 1 if run.resumed_step else None)
        about = f"{run.project} / {run.name} ({run.run_id}) {' '.join(run.tags)}".strip()
        self.writer.add_text("run", about, run.resumed_step)
        self.writer.add_text("settings", f"```\n{write_yaml(dict(run.settings))}```", run.resumed_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self.writer.close()
