"""On a GPU: gradients that go through NCCL, region by region and inside one CUDA graph, in a job of one worker."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from apps.training.workers.reducer import GradientReducer
from backends.precision import as_torch
from compiled.cuda_graph import GraphedProgram
from compiled.program import CompiledProgram
from compiled.reduction import OneWorker, Reducer
from tests.compiled.conftest import Compile, Compiled
from tests.compiled.test_cuda import CUDA, on_gpu

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def nccl() -> Iterator[dist.ProcessGroup]:
    """A group of one: every sum is the tensor itself."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield dist.group.WORLD
    dist.destroy_process_group()


def train(compiled: Compiled, program_class: type[CompiledProgram], reducer: Reducer) -> list[torch.Tensor]:
    """Losses and norms of some steps, of one and of two microbatches, clipped or not."""
    model = compiled.model().cuda()
    precision = compiled.plan.precision
    master = None if precision.master == "none" else as_torch(precision.master)
    moments = as_torch(precision.moments)
    program = program_class(compiled.artifact, model, moments_dtype=moments, master_dtype=master, reducer=reducer)
    found = []
    for step in range(1, 10):
        batches = [on_gpu(compiled.batch(10 * step + index, of=512)) for index in range(1 + step % 2)]
        clip = None if step % 3 else 0.2
        result = program.train_step(batches, compiled.hyperparameters(model, step).cuda(), clip)
        found += [result.loss] if result.grad_norm is None else [result.loss, result.grad_norm]
    return found


@pytest.mark.parametrize("program_class", [CompiledProgram, GraphedProgram])
@pytest.mark.parametrize("shards", [False, True])
def test_sums_through_nccl_give_the_numbers_of_one_worker(
    compile_step: Compile, nccl: dist.ProcessGroup, program_class: type[CompiledProgram], shards: bool
) -> None:
    fields = {"hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 128}
    compiled = compile_step(CUDA, "model.max_seq_length=128", "model.dtype=float32", **fields)
    reducer = GradientReducer(nccl, rank=0, world_size=1, shards=shards)
    ours, alone = train(compiled, program_class, reducer), train(compiled, CompiledProgram, OneWorker())
    # the embedding's gradient is summed with atomics, whose order changes from run to run
    torch.testing.assert_close(torch.stack(ours), torch.stack(alone), rtol=1e-4, atol=0)
