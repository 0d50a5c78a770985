"""A compression's passes over the data: a progress line for each, and the watch hears that they go on."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from apps.training.progress import Progress

if TYPE_CHECKING:
    from apps.training.workers.group import Workers


class Passes:
    """What `compress_model` takes as `on_pass`. Also a context manager that takes the last line down."""

    def __init__(self, workers: Workers, mode: Literal["auto", "on", "off"]) -> None:
        self.workers, self.mode = workers, mode
        self._up = ExitStack()

    def __call__(self, what: str, of: str, done: int, total: int) -> None:
        """`done` of `total` are done; the first call of a pass has none done."""
        self.workers.doing(f"{what}, {done} of {total} {of} done")
        if done == 0:
            self._progress = self._up.enter_context(Progress(total, what.capitalize(), of, mode=self.mode))
        self._progress.show(done, total)
        if done == total:
            self._up.close()

    def __enter__(self) -> Passes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._up.close()
