"""save_model: what plain transformers reads, bit for bit, and a folder that is never half old and half new."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from backends.errors import UserError
from modelzoo import checkpoint_writing, load_config, load_model, save_model
from modelzoo.folder_exchange import exchange
from tests.modelzoo.llamas import ROPES, llama_config, llama_configs, twins

PLAIN_TRANSFORMERS = """
import sys, warnings
warnings.simplefilter("error")
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert type(model).__name__ == "LlamaForCausalLM", type(model)
    torch.save((model(torch.arange(40).reshape(2, 20)).logits.detach(), model.dtype), folder + "/logits.pt")
assert not {"modelzoo", "backends"} & set(sys.modules)
"""


def test_plain_transformers_gives_the_same_logits_bit_for_bit_in_a_process_of_its_own(tmp_path: Path) -> None:
    cases = {
        "float32": ({}, torch.float32, "5GB"),
        "bfloat16-llama3": ({"rope_parameters": dict(ROPES[3]), "head_dim": 16}, torch.bfloat16, "5GB"),
        "tied": ({"tie_word_embeddings": True, "pad_token_id": 5}, torch.float32, "5GB"),
        "sharded": ({"attention_bias": True, "mlp_bias": True}, torch.float32, 9_000),
    }
    expected = {}
    for name, (changes, dtype, max_shard_size) in cases.items():
        _, ours = twins(llama_config(**changes), dtype)
        save_model(ours, tmp_path / name, max_shard_size=max_shard_size)
        expected[name] = ours(torch.arange(40).reshape(2, 20)).logits
    folders = [str(tmp_path / name) for name in cases]
    # -I: neither this folder nor PYTHONPATH is looked at.
    subprocess.run([sys.executable, "-I", "-c", PLAIN_TRANSFORMERS, *folders], check=True)
    for name, (_, dtype, _) in cases.items():
        logits, loaded_dtype = torch.load(tmp_path / name / "logits.pt")
        assert torch.equal(logits, expected[name]), name
        assert loaded_dtype == dtype


@given(config=llama_configs(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=15)
def test_what_is_saved_is_what_is_loaded(config: LlamaConfig, dtype: torch.dtype) -> None:
    theirs, ours = twins(config, dtype)
    with TemporaryDirectory() as folder:
        save_model(ours, folder)
        plain = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
        again = load_model(folder, load_config(model_name_or_path=folder))
    for name, expected in theirs.state_dict().items():
        assert torch.equal(plain.state_dict()[name], expected)
        assert torch.equal(again.state_dict()[name], expected)
    kept = {name: value for name, value in config.to_dict().items() if name not in ("dtype", "_name_or_path")}
    assert {**plain.config.to_dict(), **kept} == plain.config.to_dict()


def test_the_config_written_is_the_one_of_hugging_face(tmp_path: Path) -> None:
    _, ours = twins(llama_config(architectures=None), torch.bfloat16, article_attention=True, norm_dtype="float64")
    config = json.loads((save_model(ours, tmp_path / "out") / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert not {"article_attention", "norm_dtype", "compute_dtype"} & set(config)


def test_shards_are_no_larger_than_asked_for_and_the_index_names_them(tmp_path: Path) -> None:
    _, ours = twins(llama_config())
    save_model(ours, tmp_path, max_shard_size=9_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 9_000 for file in files)


def test_transformers_own_save_pretrained_writes_the_same_layout(tmp_path: Path) -> None:
    theirs, ours = twins(llama_config(tie_word_embeddings=True), article_attention=True)
    ours.save_pretrained(tmp_path)
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), theirs.parameters(), strict=True))


def test_the_tokenizer_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(source)
    (source / "chat_template.jinja").write_text("hello")
    (source / "notes.txt").write_text("not the tokenizer's")
    out = save_model(twins(llama_config())[1], tmp_path / "out", source)
    assert (out / "chat_template.jinja").read_text() == "hello"
    assert (out / "tokenizer.json").is_file()
    assert not (out / "notes.txt").exists()


def test_the_end_of_text_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    for eos in (5, 9):
        backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(20)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=f"w{eos}").save_pretrained(tmp_path / str(eos))
    _, ours = twins(llama_config(eos_token_id=[3, 5]))
    fitting = save_model(ours, tmp_path / "fitting", tmp_path / "5")
    assert json.loads((fitting / "config.json").read_text())["eos_token_id"] == [3, 5]
    other = save_model(ours, tmp_path / "other", tmp_path / "9")
    assert json.loads((other / "config.json").read_text())["eos_token_id"] == 9
    assert json.loads((other / "generation_config.json").read_text())["eos_token_id"] == 9
    assert ours.config.eos_token_id == [3, 5]


def test_whoever_may_read_the_config_may_read_the_weights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        out = save_model(twins(llama_config())[1], tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o640}


def test_a_folder_without_tokenizer_is_refused_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer"):
        save_model(twins(llama_config())[1], tmp_path / "out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_new_checkpoint_replaces_the_old_one_and_keeps_everything_else(tmp_path: Path) -> None:
    _, ours = twins(llama_config())
    out = save_model(ours, tmp_path / "out", max_shard_size=9_000)
    (out / "pytorch_model.bin").write_text("of an even older one")
    (out / "plots").mkdir()
    (out / "plots" / "loss.png").write_text("png")
    (out / "link").symlink_to("plots")
    with (out / "metrics.csv").open("a") as log:
        log.write("step 1\n")
        log.flush()
        save_model(ours, out)
        log.write("step 2\n")
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "link", "metrics.csv", "model.safetensors", "plots"
    ]  # fmt: skip
    assert (out / "metrics.csv").read_text() == "step 1\nstep 2\n"
    assert (out / "link" / "loss.png").read_text() == "png"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", ["save_file", "_write_tokenizer", "sync", "_exchange"])
def test_a_failure_at_any_step_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    _, old = twins(llama_config())
    out = save_model(old, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writing, step, fail)
    _, new = twins(llama_config())
    with pytest.raises(UserError, match=r"Cannot save .*No space left on device\. Make room"):
        save_model(new, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_full_disk_of_safetensors_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint_writing, "save_file", fail)
    with pytest.raises(UserError, match=r"Cannot save .*No space left on device.*Make room"):
        save_model(twins(llama_config())[1], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_runs_checkpoints_are_under_their_name_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed right before or right behind the exchange leaves them there, and so does a writer beside it."""
    out = save_model(twins(llama_config())[1], tmp_path / "out")
    (out / "checkpoints" / "iter_1").mkdir(parents=True)
    (out / "checkpoints" / "iter_1" / "state.json").write_text("{}")
    seen = []

    def look(new: Path, target: Path) -> None:
        seen.append((target / "checkpoints" / "iter_1" / "state.json").read_text())
        (target / "checkpoints" / "iter_2").mkdir()  # somebody else is faster than we are
        exchange(new, target)
        seen.append((target / "checkpoints" / "iter_1" / "state.json").read_text())

    monkeypatch.setattr(checkpoint_writing, "exchange", look)
    save_model(twins(llama_config())[1], out)
    assert seen == ["{}", "{}"]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["iter_1", "iter_2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("links", [True, False])
def test_what_is_kept_is_on_the_disk_under_its_second_name_before_the_first_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """A machine that loses its power behind the exchange has a run's checkpoints, also where they had to be copied."""
    out = save_model(twins(llama_config())[1], tmp_path / "out")
    kept = out / "checkpoints" / "iter_1"
    kept.mkdir(parents=True)
    (kept / "state.json").write_text("{}")
    (kept / "last").symlink_to("state.json")
    flushed: list[Path] = []

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def look(new: Path, target: Path) -> None:
        names = {path.relative_to(new).as_posix() for path in flushed if path.is_relative_to(new)}
        copies = set() if links else {"checkpoints/iter_1/state.json"}
        assert {".", "checkpoints", "checkpoints/iter_1"} | copies <= names
        assert flushed[-1] == new
        exchange(new, target)

    if not links:
        monkeypatch.setattr("os.link", refuse)
    monkeypatch.setattr(checkpoint_writing, "sync", lambda path: flushed.append(path))
    monkeypatch.setattr(checkpoint_writing, "exchange", look)
    save_model(twins(llama_config())[1], out)
    assert (kept / "last").read_text() == "{}"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, ours = twins(llama_config())
    with pytest.raises(UserError, match="is a file. Expected a folder"):
        save_model(ours, tmp_path / "file")
    with pytest.raises(UserError, match=r"Cannot save the checkpoint to .*Not a directory"):
        save_model(ours, tmp_path / "file" / "out")
