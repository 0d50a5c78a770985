"""The whole step as one CUDA graph: the device replays it without waiting for Python between its kernels.

Small models need it (clm-60m's kernels are shorter than their launches), large ones gain a little. The first step of
each kind runs kernel by kernel, which sets up the libraries' workspaces; the next ones are recorded; all later ones are
replays. Two recordings take turns: launching one that still runs waits for its end, and holds the driver meanwhile, so
that neither the next step's data nor a checkpoint's copies get through.
"""

import gc
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiled.measuring import Mode
from compiled.phases import Mark
from compiled.program import CompiledProgram
from compiled.step_result import StepResult

IN_TURN = 2


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    microbatches: list[dict[str, Tensor]]
    hyperparameters: Tensor
    max_grad_norm: Tensor | None
    result: StepResult
    marks: list[Mark]  # the events that tell where its time goes


class GraphedProgram(CompiledProgram):
    """A `CompiledProgram` whose train step is replayed: the same kernels in the same order.

    Losses agree within the rounding of the embedding's gradient, which CUDA sums in an order of its own.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # by number of microbatches, whether gradients are clipped by norm, the value they are clipped by, and what is
        # measured; the next one to be replayed stands last
        self._records: dict[tuple[int, bool, float | None, Mode], deque[_Recorded]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # recordings share their memory: one replays at a time

    def train_step(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        hyperparameters: Tensor,
        max_grad_norm: float | Tensor | None,
        max_grad_value: float | None = None,
    ) -> StepResult:
        """As `CompiledProgram.train_step`; each number of microbatches, clipped or not, has recordings of its own."""
        kind = (len(microbatches), max_grad_norm is None, max_grad_value, self.measuring.mode)
        if kind not in self._records:
            self._records[kind] = deque()
            return super().train_step(microbatches, hyperparameters, max_grad_norm, max_grad_value)
        records = self._records[kind]
        if len(records) < IN_TURN:
            records.append(self._record(microbatches, hyperparameters, max_grad_norm, max_grad_value))
        record = records.pop()
        records.appendleft(record)
        for static, given in zip(record.microbatches, microbatches, strict=True):
            for name, tensor in static.items():
                tensor.copy_(given[name], non_blocking=True)
        record.hyperparameters.copy_(hyperparameters, non_blocking=True)
        if record.max_grad_norm is not None:
            record.max_grad_norm.fill_(max_grad_norm)  # type: ignore[arg-type]
        record.graph.replay()
        # the next replay overwrites these, and a loss may be read a step late
        self.measuring.phases.marks = record.marks
        result = record.result
        return StepResult(
            result.loss.clone(), _copied(result.grad_norm), _copied(result.objective), _copied(result.applied)
        )

    def _record(
        self,
        microbatches: Sequence[Mapping[str, Tensor]],
        hyperparameters: Tensor,
        max_grad_norm: float | Tensor | None,
        max_grad_value: float | None,
    ) -> _Recorded:
        static = [{name: tensor.clone() for name, tensor in microbatch.items()} for microbatch in microbatches]
        hyper = hyperparameters.to(self.device, copy=True)
        clip = None if max_grad_norm is None else torch.full((), float(max_grad_norm), device=self.device)
        # The recording has a memory pool of its own: give back what the first step's activations took.
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog thread asks the device about its events meanwhile: only this thread is being recorded.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = super().train_step(static, hyper, clip, max_grad_value)
        return _Recorded(graph, static, hyper, clip, result, self.measuring.phases.marks)


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
