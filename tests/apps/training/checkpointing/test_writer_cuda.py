"""The snapshot of a GPU's tensors: in the order of its work, through pinned memory, without the host waiting."""

from pathlib import Path

import pytest
import torch

from apps.training.checkpointing import snapshot
from apps.training.checkpointing.reading import Checkpoint
from apps.training.checkpointing.tensor_file import CHUNK
from apps.training.checkpointing.writer import CheckpointWriter
from tests.apps.training.checkpointing.toys import ToyModel, ToyProgram, records, same

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("room", [True, False])
def test_what_the_device_held_behind_the_step_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    monkeypatch.setattr(snapshot, "_has_room", lambda tensors: room)
    model = ToyModel(seed=3)
    model.large = torch.nn.Parameter(torch.arange(8 * CHUNK * 5 // 8, dtype=torch.float32))  # two pieces and a half
    model = model.cuda()
    program = ToyProgram(model)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    busy = torch.randn(4096, 4096, device="cuda")
    writer = CheckpointWriter(tmp_path)
    for step in (1, 2):
        with torch.no_grad():
            for _ in range(20):  # so that the copies are far from made when snapshot() returns
                busy = (busy @ busy).clamp_(-1, 1)
            model.large += step
        writer.snapshot(step, model, program)
        with torch.no_grad():
            model.large.fill_(-1).copy_(expected["large"])  # the next step, queued behind
        writer.write({}, records(step), [])
    writer.wait()
    found = ToyModel()
    found.large = torch.nn.Parameter(torch.zeros_like(model.large, device="cpu"))
    found = found.cuda()
    for step in (1, 2):
        checkpoint = Checkpoint(tmp_path / f"iter_{step}")
        checkpoint.load_weights(found)
        wanted = expected | {"large": expected["large"] + step}
        assert same({name: parameter.detach() for name, parameter in found.named_parameters()}, wanted)
        taken = ToyProgram(model, seed=9)
        checkpoint.load_optimizer(taken)
        assert same(taken.state, program.state)


def test_the_devices_random_numbers_go_on(tmp_path: Path) -> None:
    model = ToyModel().cuda()
    writer = CheckpointWriter(tmp_path)
    torch.cuda.manual_seed(4)
    torch.rand(5, device="cuda")
    writer.snapshot(1, model, ToyProgram(model))
    after = torch.rand(5, device="cuda")
    writer.write({}, records(1), [])
    writer.wait()
    Checkpoint(tmp_path / "iter_1").load_rng()
    assert torch.equal(torch.rand(5, device="cuda"), after)
