"""What is written is what was there at the moment of the snapshot, and training does not wait for it."""

import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import modelzoo
from apps.training.checkpointing import tensor_file
from apps.training.checkpointing.reading import Checkpoint, newest
from apps.training.checkpointing.static_files import static_files
from apps.training.checkpointing.writer import CheckpointWriter
from apps.training.reporting.records import Evaluation
from backends.errors import UserError
from tests.apps.training.checkpointing.toys import ToyModel, ToyProgram, records, same, save


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 7, state={"settings": {"training": {"seed": 1}}, "lr": 0.1})
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.world_size, checkpoint.path) == (7, 1, tmp_path / "iter_7")
    assert checkpoint.state == {"settings": {"training": {"seed": 1}}, "lr": 0.1}
    assert checkpoint.records == records(7)
    assert checkpoint.evaluations == [Evaluation(step=7, loss=0.5, num_counted=7)]
    model = ToyModel(seed=0)
    program = ToyProgram(model)
    checkpoint.load_weights(model)
    checkpoint.load_optimizer(program)
    checkpoint.load_buffers(model)
    checkpoint.load_rng()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(700)))
    expected = ToyModel(seed=7)
    assert same(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert torch.equal(model.seen, expected.seen)
    assert same(program.state, ToyProgram(expected, seed=7).state)


def test_a_step_after_the_snapshot_changes_nothing_of_it(tmp_path: Path) -> None:
    model = ToyModel(seed=3)
    program = ToyProgram(model, seed=3)
    writer = CheckpointWriter(tmp_path)
    writer.snapshot(3, model, program)
    with torch.no_grad():
        for tensor in (*model.parameters(), *program.state.values(), model.seen):
            tensor.fill_(1)
    writer.write({}, records(5), [Evaluation(step=step, loss=0.5, num_counted=7) for step in (2, 4)])
    writer.wait()
    saved = Checkpoint(tmp_path / "iter_3")
    assert same(load_file(saved.path / "model.safetensors"), dict(ToyModel(seed=3).named_parameters()))
    assert saved.records == records(3)
    assert [each.step for each in saved.evaluations] == [2]


def test_transformers_opens_it_without_this_project(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(tmp_path)
    model = modelzoo.build_model(modelzoo.load_config(config_name=tmp_path), device="cpu", dtype="bfloat16", seed=3)
    program = ToyProgram(model)
    writers = [
        CheckpointWriter(tmp_path / "d", rank=rank, world_size=2, static=static_files(model, None)) for rank in (0, 1)
    ]
    for writer in writers:
        writer.snapshot(1, model, program)
        writer.write({}, records(1), [])
    for writer in writers:
        writer.wait()
    saved = tmp_path / "d" / "iter_1"
    assert sorted(path.name for path in saved.glob("model*")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    found, problems = AutoModelForCausalLM.from_pretrained(saved, dtype="auto", output_loading_info=True)
    assert not any(problems.values())
    assert same(dict(found.named_parameters()), dict(model.named_parameters()))


@pytest.mark.parametrize("then", [1, 2, 3])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_any_number_of_workers_goes_on_from_any_other(tmp_path: Path, then: int, now: int) -> None:
    save(tmp_path, 2, world_size=then)
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    for rank in range(now):
        model = ToyModel(seed=0)
        program = ToyProgram(model, owned={"bias"} if rank % 2 else None)
        checkpoint.load_weights(model)
        checkpoint.load_optimizer(program)
        checkpoint.load_buffers(model, rank)
        torch.manual_seed(5)
        checkpoint.load_rng(rank)
        expected = ToyModel(seed=2)
        assert same(dict(model.named_parameters()), dict(expected.named_parameters()))
        everything = ToyProgram(expected, seed=2).state
        assert same(program.state, {key: everything[key] for key in program.state})
        assert torch.equal(model.seen, expected.seen + rank % then)
        assert torch.initial_seed() == (200 + rank if rank < then else 5)


def test_sharded_state_is_written_by_whoever_holds_it(tmp_path: Path) -> None:
    """Worker 1 holds nothing: fewer parameters than workers."""
    owned: list[set[str]] = [{"first", "bias"}, set(), {"second"}]
    model = ToyModel(seed=4)
    writers = [CheckpointWriter(tmp_path, rank=rank, world_size=3, sharded_optimizer=True) for rank in range(3)]
    for writer in writers:
        writer.snapshot(4, model, ToyProgram(model, seed=4, owned=owned[writer.rank]))
        writer.write({}, records(4), [])
    for writer in writers:
        writer.wait()
    program = ToyProgram(model)
    Checkpoint(tmp_path / "iter_4").load_optimizer(program)
    assert same(program.state, ToyProgram(model, seed=4).state)


class Gate:
    """Stands for a slow disk: writes wait until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        real = tensor_file.HostBytes.__call__

        def slow(host: tensor_file.HostBytes, tensor: Tensor) -> Iterator[memoryview]:
            self.reached.set()
            assert self.opened.wait(30)
            return real(host, tensor)

        monkeypatch.setattr(tensor_file.HostBytes, "__call__", slow)


def test_training_goes_on_while_a_slow_disk_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    model = ToyModel()
    writer = CheckpointWriter(tmp_path)
    writer.snapshot(1, model, ToyProgram(model))
    writer.write({}, records(1), [])
    assert gate.reached.wait(30)
    assert not list(tmp_path.glob("iter_*"))  # we are here although nothing is complete
    gate.opened.set()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["iter_1"]


def test_the_next_snapshot_waits_for_the_one_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    model = ToyModel(seed=1)
    writer = CheckpointWriter(tmp_path)
    writer.snapshot(1, model, ToyProgram(model))
    writer.write({}, records(1), [])
    threading.Timer(0.2, gate.opened.set).start()
    begin = time.perf_counter()
    writer.snapshot(2, ToyModel(seed=2), ToyProgram(model))
    assert time.perf_counter() - begin >= 0.15
    assert same(load_file(tmp_path / "iter_1" / "model.safetensors"), dict(model.named_parameters()))


def test_snapshots_share_their_memory(tmp_path: Path) -> None:
    model = ToyModel()
    writer = CheckpointWriter(tmp_path)
    places = set()
    for step in (1, 2, 3):
        writer.snapshot(step, model, ToyProgram(model))
        assert writer._snapshot is not None
        places.add(tuple(tensor.data_ptr() for tensor in writer._snapshot.own.values()))
        writer.write({}, records(step), [])
    writer.wait()
    assert len(places) == 1


def full_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from apps.training.checkpointing import writer as module

    real = module.write_tensors

    def failing(path: Path, tensors: Mapping[str, Tensor], *rest: object) -> object:
        if path.parent.name.endswith(f"iter_{step}") and "optimizer" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return real(path, tensors, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_tensors", failing)


def test_a_full_disk_costs_one_checkpoint_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(monkeypatch, step=2)
    save(tmp_path, 1)
    model = ToyModel()
    writer = CheckpointWriter(tmp_path, keep=1)
    for step in (2, 3):
        writer.snapshot(step, model, ToyProgram(model))
        writer.write({}, records(step), [])
        if step == 2:
            assert (tmp_path / "iter_1").is_dir()
    writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["iter_3"]
    told = capsys.readouterr().err
    assert told.startswith("warning: The checkpoint of step 2 was not saved")
    assert "No space left on device" in told
    assert told.count("\n") == 1


def test_a_last_checkpoint_that_failed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    full_disk(monkeypatch, step=2)
    with pytest.raises(UserError, match=r"step 2 was not saved in '.*': No space left on device\. Earlier ones"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["iter_1"]


def test_one_worker_without_room_fails_the_checkpoint_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from apps.training.checkpointing import writer as module

    real = module.write_tensors

    def failing(path: Path, *rest: object) -> object:
        if path.name.startswith("optimizer-00002"):
            raise OSError(28, "No space left on device", str(path))
        return real(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_tensors", failing)
    with pytest.raises(UserError, match=r"step 2 was not saved.*worker 1: .*No space left on device"):
        save(tmp_path, 2, world_size=2)
    assert list(tmp_path.glob("iter_*")) == []
