"""load_model: any Hugging Face Llama checkpoint in, the same logits out; or one line that says what does not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from backends.errors import UserError
from modelzoo import build_model, load_config, load_model, save_model
from modelzoo.llama import ZooLlamaForCausalLM
from tests.modelzoo.checkpoints import LAYOUTS, write_checkpoint
from tests.modelzoo.llamas import llama_config, twins


def load(folder: Path, **options: Any) -> ZooLlamaForCausalLM:
    return load_model(folder, load_config(model_name_or_path=folder), **options)


def same_logits(ours: Any, theirs: Any) -> bool:
    input_ids = torch.arange(30).reshape(2, 15)
    return torch.equal(ours(input_ids).logits, theirs(input_ids).logits)


def message(folder: Path, **config: Any) -> str:
    with pytest.raises(UserError) as raised:
        load_model(folder, load_config(model_name_or_path=folder, **config))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_logits_of_transformers(tmp_path: Path, layout: str, tied: bool) -> None:
    theirs, _ = twins(llama_config(tie_word_embeddings=tied, attention_bias=True))
    ours = load(write_checkpoint(theirs, tmp_path, layout))
    assert same_logits(ours, theirs)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert not ours.training
    assert ours.name_or_path == str(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tmp_path: Path, stored: torch.dtype) -> None:
    theirs, _ = twins(llama_config(), stored)
    write_checkpoint(theirs, tmp_path)
    assert load(tmp_path).dtype == (torch.float32 if stored == torch.float16 else stored)
    ours = load(tmp_path, dtype="bfloat16")
    weight = theirs.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(ours.get_parameter("model.layers.0.mlp.up_proj.weight"), weight.bfloat16())


def test_the_weights_do_not_hang_on_the_file(tmp_path: Path) -> None:
    theirs, _ = twins(llama_config())
    ours = load(write_checkpoint(theirs, tmp_path))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * 20_000)  # in place: a mapped file would change under the model
    assert same_logits(ours, theirs)


def test_a_checkpoint_of_the_bare_model_has_its_names_without_prefix(tmp_path: Path) -> None:
    theirs, _ = twins(llama_config(tie_word_embeddings=True))
    bare = LlamaModel(theirs.config)
    bare.load_state_dict(theirs.model.state_dict())
    bare.save_pretrained(tmp_path)
    theirs.config.architectures = ["LlamaForCausalLM"]
    theirs.config.save_pretrained(tmp_path)
    assert same_logits(load(tmp_path), theirs)


def test_rotary_frequencies_of_old_checkpoints_are_left_out(tmp_path: Path) -> None:
    theirs, _ = twins(llama_config())
    weights = {**theirs.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    assert same_logits(load(write_checkpoint(theirs, tmp_path, weights=weights)), theirs)


def test_generation_config_is_kept_even_when_transformers_would_not_save_it(tmp_path: Path) -> None:
    write_checkpoint(twins(llama_config())[0], tmp_path / "in")
    published = {"temperature": 0.9, "top_p": 0.6, "do_sample": False, "eos_token_id": [7, 9]}
    (tmp_path / "in" / "generation_config.json").write_text(json.dumps(published))
    ours = load(tmp_path / "in")
    assert ours.generation_config.eos_token_id == [7, 9]
    save_model(ours, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {name: saved[name] for name in published} == published


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    write_checkpoint(twins(llama_config())[0], tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    assert "generation_config.json" in message(tmp_path)


def test_memory_taken_is_that_of_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "vocab_size": 8000, "num_hidden_layers": 4}
    theirs = LlamaForCausalLM(llama_config(**sizes)).bfloat16()
    write_checkpoint(theirs, tmp_path)
    size = sum(parameter.numel() for parameter in theirs.parameters()) * 4
    del theirs
    seen = [anonymous_memory()]
    calls: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        seen.append(anonymous_memory())

    load(tmp_path, dtype=torch.float32, progress=progress)
    assert max(seen) - seen[0] < 1.15 * size
    assert calls[-1] == (size // 2, size // 2)
    assert calls == sorted(calls)


def anonymous_memory() -> int:
    """Bytes that this process holds, mapped files left out."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def test_a_missing_folder() -> None:
    with pytest.raises(UserError, match="no folder 'nowhere'"):
        load_model("nowhere", load_config(config_name="demo"))


def test_shapes_that_differ_are_told_from_both_sides(tmp_path: Path) -> None:
    theirs, _ = twins(llama_config())
    write_checkpoint(theirs, tmp_path)
    llama_config(vocab_size=70, intermediate_size=48).save_pretrained(tmp_path)
    told = message(tmp_path)
    assert "model.embed_tokens.weight (checkpoint [61, 32], config [70, 32])" in told
    assert "mlp.gate_proj.weight (checkpoint [44, 32], config [48, 32])" in told
    assert "and 5 more" in told


@pytest.mark.parametrize(
    ("layers", "told"), [(3, "Missing: model.layers.2."), (1, "Not in the model: model.layers.1.")]
)
def test_names_that_differ_are_told(tmp_path: Path, layers: int, told: str) -> None:
    write_checkpoint(twins(llama_config())[0], tmp_path)
    llama_config(num_hidden_layers=layers).save_pretrained(tmp_path)
    assert told in message(tmp_path)
    assert "and 6 more" in message(tmp_path)


def test_a_missing_head_is_told_unless_it_is_tied(tmp_path: Path) -> None:
    theirs, _ = twins(llama_config())
    weights: dict[str, Tensor] = dict(theirs.state_dict())
    del weights["lm_head.weight"]
    write_checkpoint(theirs, tmp_path, weights=weights)
    assert "Missing: lm_head.weight." in message(tmp_path)


def test_a_tied_model_may_be_stored_under_the_head_alone(tmp_path: Path) -> None:
    theirs, _ = twins(llama_config(tie_word_embeddings=True))
    weights = dict(theirs.state_dict())
    del weights["model.embed_tokens.weight"]
    write_checkpoint(theirs, tmp_path)
    save_file({**weights, "lm_head.weight": theirs.lm_head.weight.detach()}, tmp_path / "model.safetensors")
    assert same_logits(load(tmp_path), theirs)


def test_a_tied_model_with_two_matrices_is_refused(tmp_path: Path) -> None:
    theirs, _ = twins(llama_config(tie_word_embeddings=True))
    weights = {**theirs.state_dict(), "lm_head.weight": torch.zeros(61, 32)}
    write_checkpoint(theirs, tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    assert "Set tie_word_embeddings to false" in message(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    theirs, _ = twins(llama_config())
    weights = {**theirs.state_dict(), "model.norm.weight": torch.ones(32).to(dtype)}
    assert "has to be dequantized" in message(write_checkpoint(theirs, tmp_path, weights=weights))


@pytest.mark.parametrize("layout", ["single safetensors", "sharded safetensors", "single bin"])
def test_from_pretrained_of_transformers_loads_the_zoo_model_too(tmp_path: Path, layout: str) -> None:
    theirs, _ = twins(llama_config())
    write_checkpoint(theirs, tmp_path, layout)
    assert same_logits(ZooLlamaForCausalLM.from_pretrained(tmp_path), theirs)
    config = load_config(model_name_or_path=tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path, config=config)) is ZooLlamaForCausalLM


def test_from_pretrained_refuses_another_family(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(UserError, match="of type 'gemma2'. Expected 'llama'"):
        ZooLlamaForCausalLM.from_pretrained(tmp_path)


def test_what_was_built_and_saved_is_loaded(tmp_path: Path) -> None:
    built = build_model(load_config(config_name="demo"), seed=3).eval()
    save_model(built, tmp_path)
    assert same_logits(load(tmp_path), built)
