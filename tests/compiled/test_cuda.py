"""On a GPU: the compiled step against the eager twin, replayed graphs against single regions, a fresh process."""

import copy
from typing import Any

import pytest
import torch

from apps.training.eager_program import EagerProgram
from backends.precision import as_torch
from compiled.cuda_graph import GraphedProgram
from compiled.measuring import COLUMNS
from compiled.program import CompiledProgram
from tests.compiled.conftest import Compile, Compiled

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = "compile.arch=cuda"


def on_gpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def make(compiled: Compiled, program_class: type[CompiledProgram], model: Any, **options: Any) -> CompiledProgram:
    master = compiled.plan.precision.master
    return program_class(
        compiled.artifact,
        model,
        moments_dtype=as_torch(compiled.plan.precision.moments),
        master_dtype=None if master == "none" else as_torch(master),
        recomputed=compiled.recomputed,
        **options,
    )


@pytest.mark.parametrize(
    ("dtype", "settings", "tolerance"),
    [
        ("float32", (), 1e-4),
        ("bfloat16", ("compile.head_chunks=4",), 3e-2),
        ("bfloat16", ("model.article_attention=true", "run.recompute=block"), 3e-2),
    ],
)
def test_training_follows_the_eager_twin(
    compile_step: Compile, dtype: str, settings: tuple[str, ...], tolerance: float
) -> None:
    # head_dim 64 and 128 positions: shapes the GPU's own attention kernels take
    fields = {"hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 128}
    compiled = compile_step(CUDA, "model.max_seq_length=128", f"model.dtype={dtype}", *settings, **fields)
    ours = compiled.model().cuda()
    theirs = copy.deepcopy(ours)
    program = make(compiled, CompiledProgram, ours)
    twin = EagerProgram(theirs, precision=compiled.plan.precision)
    for step in range(1, 6):
        batches = [on_gpu(compiled.batch(10 * step + index, 0.8, of=400)) for index in range(1 + step % 2)]
        hyper = compiled.hyperparameters(ours, step)
        clip = None if step == 3 else 1.0
        result, expected = program.train_step(batches, hyper.cuda(), clip), twin.train_step(batches, hyper, clip)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=tolerance)
    batch = on_gpu(compiled.batch(99))
    assert program.evaluate(batch).item() == pytest.approx(twin.evaluate(batch).item(), rel=tolerance)


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [(("model.dtype=float32",), 1e-5), (("model.dtype=bfloat16", "model.article_attention=true"), 1e-2)],
    ids=["float32", "articles"],
)
def test_a_replayed_graph_gives_the_bits_of_single_regions(
    compile_step: Compile, settings: tuple[str, ...], tolerance: float
) -> None:
    fields = {"hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 128}
    compiled = compile_step(CUDA, "model.max_seq_length=128", *settings, **fields)
    losses = []
    for program_class in (CompiledProgram, GraphedProgram):
        model = compiled.model().cuda()
        program = make(compiled, program_class, model)
        losses.append([])
        for step in range(1, 9):
            batches = [on_gpu(compiled.batch(10 * step + index, of=512)) for index in range(1 + step % 2)]
            clip = 0.1 if step % 3 else 0.2
            result = program.train_step(batches, compiled.hyperparameters(model, step).cuda(), clip)
            losses[-1].append((result.loss, result.grad_norm))
    # the embedding's gradient is summed with atomics, whose order changes from run to run
    for (loss, norm), (expected, expected_norm) in zip(*losses, strict=True):
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(norm, expected_norm, rtol=10 * tolerance, atol=0)


def test_a_replayed_step_is_measured_as_single_regions_are(compile_step: Compile) -> None:
    fields = {"hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 128}
    compiled = compile_step(CUDA, "model.max_seq_length=128", "model.dtype=float32", **fields)
    tables, hits = [], []
    for program_class in (CompiledProgram, GraphedProgram):
        model = compiled.model().cuda()
        program = make(compiled, program_class, model, stats_every=3)
        for step in range(1, 16):  # measured at 3, 6, 9, 12, 15: by regions, while it is recorded, and replayed
            program.measuring.begin(step)
            program.train_step([on_gpu(compiled.batch(step))], compiled.hyperparameters(model, step).cuda(), 0.1)
            if program.measuring.measures:
                tables.append(program.measuring.table.cpu())
                hits.append(program.measuring.accuracy.item())
                seconds = program.measuring.phases.seconds()
                assert {"forward", "head", "accuracy", "backward", "statistics", "update"} <= seconds.keys()
                assert all(0 <= time < 5 for time in seconds.values())
                assert sum(seconds.values()) > 0
    assert hits[:5] == pytest.approx(hits[5:], abs=1e-6)
    for ours, theirs in zip(tables[:5], tables[5:], strict=True):
        for column, name in enumerate(COLUMNS):
            scale = theirs[:, column].abs()
            if name.startswith("dot"):
                last = theirs[:, COLUMNS.index(f"{name.removeprefix('dot_')}_square")]
                scale = (theirs[:, COLUMNS.index("grad_square")] * last).sqrt()
            assert ((ours[:, column] - theirs[:, column]).abs() <= 1e-3 * scale + 1e-12).all(), name


def test_a_replayed_step_skips_what_is_not_finite_and_drops_what_single_regions_drop(compile_step: Compile) -> None:
    fields = {"hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 128}
    recipe = ("training.max_nonfinite_steps=3", "training.z_loss=0.02", "model.residual_dropout=0.1")
    shape = ("model.max_seq_length=128", "model.dtype=float32", "model.attention_dropout=0.1")
    compiled = compile_step(CUDA, *shape, *recipe, **fields)
    losses = []
    for program_class in (CompiledProgram, GraphedProgram):
        model = compiled.model().cuda()
        program = make(compiled, program_class, model, loss_terms=compiled.loss_terms)
        losses.append([])
        for step in range(1, 9):
            batch = on_gpu(compiled.batch(step))
            if step in (4, 7):
                batch["grad_scale"][0, 0] = torch.nan
            before = [parameter.clone() for parameter in model.parameters()]
            result = program.train_step([batch], compiled.hyperparameters(model, step).cuda(), 1.0, 0.5)
            assert bool(result.applied) == (step not in (4, 7))
            kept = all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
            assert kept == (step in (4, 7))
            losses[-1].append(torch.stack([result.loss, result.objective]))
    for found, expected in zip(*losses, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, equal_nan=True)
