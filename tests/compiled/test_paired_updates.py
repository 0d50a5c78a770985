"""Two gradients that only the update adds, of workers or microbatches, against the same step with sums made before."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apps.training.step_plan import StepPlan
from apps.training.workers.peer_copies import PeerCopies
from apps.training.workers.reducer import GradientReducer
from compiled.program import CompiledProgram
from tests.apps.training.workers import fake_gpus
from tests.compiled.conftest import Compiled
from tests.compiled.interpreted import InterpretedArtifact

PlanOf = Callable[..., StepPlan]


class Counting(CompiledProgram):
    """A program that counts how often it runs the regions that add."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.paired, run = 0, self.binding.run

        def counted(name: str, tensors: Any) -> dict[str, Tensor]:
            self.paired += name.endswith("_paired")
            return run(name, tensors)

        self.binding.run = counted  # type: ignore[method-assign]


def trained(step: Compiled, monkeypatch: pytest.MonkeyPatch, **clipping: float) -> tuple[list[Tensor], list[int]]:
    """Each worker's weights behind three steps of two workers, and how many updates added; GPUs are threads."""
    with monkeypatch.context() as patch:
        fake_gpus.install(patch, fake_gpus.Host(2))
        patch.setattr(GradientReducer, "sum_", lambda self, tensor: tensor)  # of the loss, which is not looked at
        patch.setattr(GradientReducer, "expect_rows", lambda self, *rows: None)  # as on a GPU
        weights: list[Tensor] = [torch.empty(0)] * 2
        paired = [0, 0]
        models = [step.model() for _ in weights]

        def work(rank: int) -> None:
            model = models[rank]
            copies = PeerCopies(None, rank=rank, world_size=2)  # type: ignore[arg-type]
            reducer = GradientReducer(None, rank=rank, world_size=2, bucket_bytes=1, copies=copies)  # type: ignore[arg-type]
            dtypes = {"moments_dtype": torch.float32, "master_dtype": None}
            program = Counting(step.artifact, model, reducer=reducer, **dtypes)
            for number in range(1, 4):
                batch = step.batch(10 * number + rank)
                program.train_step([batch], step.hyperparameters(model, number), clipping.get("norm"))
            weights[rank] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            paired[rank] = program.paired

        fake_gpus.run_workers(2, work)
    return weights, paired


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_update_adds_to_the_same_bits(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr("compiled.schedule.JOINS", ("cpu",))  # as on a GPU: gradients are rows of joint ones
    plan = plan_of(f"model.dtype={dtype}", "optimizer.master_weights=none")
    sums, none_paired = trained(Compiled(plan, InterpretedArtifact(plan), []), monkeypatch)
    monkeypatch.setattr("compiled.schedule.PAIRS", ("cpu",))
    step = Compiled(plan, InterpretedArtifact(plan), [])
    pairs, all_paired = trained(step, monkeypatch)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(pairs[0], sums[0])
    assert torch.equal(pairs[1], sums[0])
    groups = len(step.artifact.manifest["schedule"]["updates"])
    assert (none_paired, all_paired) == ([0, 0], [3 * groups] * 2)
    clipped, none_paired = trained(step, monkeypatch, norm=1e9)  # looks at all sums, and changes nothing
    assert torch.equal(clipped[0], sums[0])
    assert none_paired == [0, 0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tied", [False, True])
def test_two_microbatches_of_one_worker_are_added_to_the_same_bits(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch, dtype: str, tied: bool
) -> None:
    plan = plan_of(f"model.dtype={dtype}", "optimizer.master_weights=none", tie_word_embeddings=tied)
    by_kind = {}
    for pairs in (False, True):
        monkeypatch.setattr("compiled.schedule.PAIRS", ("cpu",) if pairs else ())
        step = Compiled(plan, InterpretedArtifact(plan), [])
        model = step.model()
        program = Counting(step.artifact, model, moments_dtype=torch.float32, master_dtype=None)
        losses, counts = [], []
        for number, microbatches in enumerate((2, 1, 3, 2), 1):
            batches = [step.batch(10 * number + index) for index in range(microbatches)]
            program.paired = 0
            losses.append(program.train_step(batches, step.hyperparameters(model, number), None).loss)
            counts.append(program.paired)
        by_kind[pairs] = losses, [parameter.detach().clone() for parameter in model.parameters()]
        groups = len(step.artifact.manifest["schedule"]["updates"])
        assert counts == ([groups, 0, 0, groups] if pairs else [0] * 4)
    for found, expected in zip(by_kind[True], by_kind[False], strict=True):
        assert all(map(torch.equal, found, expected))
