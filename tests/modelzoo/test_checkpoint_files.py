"""The catalogue of a checkpoint folder, and one line for each way in which it can be broken."""

import json
import re
from pathlib import Path

import pytest
import torch

from backends.errors import UserError
from modelzoo.checkpoint_files import open_checkpoint
from tests.modelzoo.checkpoints import LAYOUTS, write_checkpoint
from tests.modelzoo.llamas import llama_config, twins


def checkpoint(folder: Path, layout: str) -> Path:
    return write_checkpoint(twins(llama_config())[0], folder, layout)


def message(folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        open_checkpoint(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_lists_the_same_tensors(tmp_path: Path, layout: str) -> None:
    theirs, _ = twins(llama_config())
    stored = open_checkpoint(write_checkpoint(theirs, tmp_path, layout))
    assert set(stored) == set(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert stored[name].shape == tuple(tensor.shape)
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name].read(), tensor)
    assert len({tensor.file for tensor in stored.values()}) == (5 if "sharded" in layout else 1)


def test_safetensors_are_preferred_to_bin_as_transformers_does(tmp_path: Path) -> None:
    checkpoint(checkpoint(tmp_path, "sharded bin"), "sharded safetensors")
    assert {tensor.file.suffix for tensor in open_checkpoint(tmp_path).values()} == {".safetensors"}


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert "has no weights. Expected one of: model.safetensors, model.safetensors.index.json" in message(tmp_path)


@pytest.mark.parametrize("layout", ["sharded safetensors", "sharded bin"])
def test_a_missing_shard_is_named(tmp_path: Path, layout: str) -> None:
    shard = sorted(checkpoint(tmp_path, layout).glob("*-00002-of-*"))[0]
    shard.unlink()
    assert re.search(rf"names 5 files, of which 1 are not in the folder: {re.escape(shard.name)}\.", message(tmp_path))


@pytest.mark.parametrize("layout", ["single safetensors", "single bin", "bin of old torch"])
@pytest.mark.parametrize("kept", [0, 6, 0.5, 0.999])
def test_a_truncated_file_is_named_with_its_size(tmp_path: Path, layout: str, kept: float) -> None:
    (file,) = [*checkpoint(tmp_path, layout).glob("*.safetensors"), *tmp_path.glob("*.bin")]
    content = file.read_bytes()
    length = int(len(content) * kept) if isinstance(kept, float) else kept
    file.write_bytes(content[:length])
    told = message(tmp_path)
    assert f"Cannot read '{file}' ({length:,} bytes)" in told
    assert "copy or download it again" in told


def test_a_pointer_left_by_git_lfs_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    assert "incomplete or damaged" in message(tmp_path)


def test_a_bin_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("the checkpoint ran code",))

    torch.save({"weight": Trap()}, tmp_path / "pytorch_model.bin")
    assert "Cannot read" in message(tmp_path)


def test_a_bin_that_is_no_state_dict(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    assert "holds a list. Expected a state dict" in message(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "as a checkpoint index" in message(tmp_path)


def test_an_index_of_another_checkpoint(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, "sharded safetensors") / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00005.safetensors"
    index.write_text(json.dumps(values))
    assert "do not hold: model.layers.9.mlp.up_proj.weight (in model-00001-of-00005.safetensors)" in message(tmp_path)
