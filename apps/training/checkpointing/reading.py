"""Checkpoints to go on from: find one, and put what it holds into a model and its program."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from apps.training.checkpointing import step_rows
from apps.training.checkpointing.manifest import (
    METRICS,
    STATE,
    complete_checkpoint,
    newest_complete,
    read_manifest,
)
from apps.training.checkpointing.shares import (
    buffers_of,
    fingerprint,
    frozen_of,
    optimizer_file,
    weight_stem,
    weights_of,
)
from apps.training.reporting.records import Evaluation, StepRecord
from backends.errors import UserError


class TakesOptimizerState(Protocol):
    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None: ...


def newest(folder: Path) -> Checkpoint | None:
    """The complete checkpoint of the latest step in `folder`, every byte checked; others are named on stderr."""
    path = newest_complete(folder)
    return None if path is None else Checkpoint(path)


def open_checkpoint(path: Path, *, is_checked: bool = False) -> Checkpoint:
    """The checkpoint `path`, an iter_STEP folder, or the newest complete one in it.

    Every byte is read and compared with the manifest, unless somebody did so already (`is_checked`). Raises UserError
    that names the file when a checkpoint is not complete, or the folder when there is none.
    """
    return Checkpoint(path if is_checked else complete_checkpoint(path))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. Its tensors are read when they are asked for, by any number of workers."""

    path: Path

    @cached_property
    def step(self) -> int:
        """The update it was taken after."""
        return int(self._stored["step"])

    @cached_property
    def world_size(self) -> int:
        """The number of workers that wrote it."""
        return int(self._stored["world_size"])

    @property
    def state(self) -> dict[str, Any]:
        """What the run gave as its state."""
        return dict(self._stored["state"])

    @cached_property
    def records(self) -> list[StepRecord]:
        """Every step from 1 to `step`."""
        return step_rows.read_rows(self.path / METRICS)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Every evaluation so far."""
        return [Evaluation(**each) for each in self._stored["evaluations"]]

    def require_base(self, model: nn.Module) -> None:
        """UserError when low-rank updates were trained on other weights than `model`'s frozen ones."""
        frozen, stored = frozen_of(model), self.state.get("base")
        if frozen and fingerprint(frozen) != stored:
            raise UserError(
                f"The frozen weights are not those that the checkpoint {self.path} was trained with: the base model "
                "has changed since. Give the same weights in checkpoint.model_name_or_path."
            )

    @torch.no_grad()
    def load_weights(self, model: nn.Module) -> None:
        """Copy the weights into `model`'s, in place. Raises UserError when a name, shape or dtype is not the same."""
        stem = weight_stem(model)
        files = [name for name in self._files if name.startswith(stem) and name.endswith(".safetensors")]
        self._copy_into(weights_of(model), _Tensors.open([self.path / name for name in files]), "weight")

    def load_optimizer(self, program: TakesOptimizerState) -> None:
        """Give the whole optimizer state to `program`, which takes its share. Raises UserError when one is missing."""
        names = [optimizer_file(rank, self.world_size) for rank in range(self.world_size)]
        program.load_optimizer_state(_Tensors.open([self.path / name for name in names], "optimizer."))

    @torch.no_grad()
    def load_buffers(self, model: nn.Module, rank: int = 0) -> None:
        """Copy the state of the layers' backends into `model`'s: worker `rank`'s own, where there was such a worker."""
        own = _Tensors.open([self._own_file(rank)], "buffer.")
        self._copy_into(buffers_of(model), own, "buffer")

    def load_rng(self, rank: int = 0) -> None:
        """Set PyTorch's random number generators to worker `rank`'s. A worker that did not exist keeps its own."""
        if rank >= self.world_size:
            return
        own = _Tensors.open([self._own_file(rank)], "rng.")
        torch.set_rng_state(own["cpu"].clone())
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"].clone())

    @cached_property
    def _stored(self) -> dict[str, Any]:
        stored: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        return stored

    @cached_property
    def _files(self) -> list[str]:
        return sorted(read_manifest(self.path)["files"])

    def _own_file(self, rank: int) -> Path:
        return self.path / optimizer_file(rank % self.world_size, self.world_size)

    def _copy_into(self, targets: Mapping[str, Tensor], stored: Mapping[str, Tensor], kind: str) -> None:
        strange = sorted(stored.keys() ^ targets.keys())
        if strange:
            where = "the checkpoint" if strange[0] in stored else "the model"
            raise UserError(
                f"The checkpoint {self.path} is of another model: {kind} {strange[0]} is only in {where}. "
                "Use the settings it was written with."
            )
        for name, target in targets.items():
            value = stored[name]
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                raise UserError(
                    f"The checkpoint {self.path} is of another model: its {kind} {name} is {_told(value)}, "
                    f"the model's is {_told(target)}. Use the settings it was written with."
                )
            target.copy_(value)


class _Tensors(Mapping[str, Tensor]):
    """Tensors of some files, those whose name begins with `prefix`, without it; each is read when it is asked for."""

    def __init__(self, places: Mapping[str, tuple[Any, str]]) -> None:
        self._places = places

    @classmethod
    def open(cls, paths: list[Path], prefix: str = "") -> _Tensors:
        places = {}
        for path in paths:
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name.startswith(prefix):
                    places[name.removeprefix(prefix)] = (file, name)
        return cls(places)

    def __getitem__(self, name: str) -> Tensor:
        file, stored_name = self._places[name]
        tensor: Tensor = file.get_tensor(stored_name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
