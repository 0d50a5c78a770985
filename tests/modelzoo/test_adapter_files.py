"""Adapter folders, judged by the real peft on the plain Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from backends.errors import UserError
from backends.lora import add_lora, load_lora, lora_layers, merge_lora, trained_parameters
from modelzoo.adapter_files import open_adapter, save_adapter
from modelzoo.llama import ZooLlamaForCausalLM
from tests.modelzoo.llamas import llama_config, relative_error, twins

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
CLOSE = 2e-6  # peft keeps A and B, and transformers its norms, in float32
IDS = torch.arange(14).reshape(2, 7)


def updated(**options: Any) -> tuple[LlamaForCausalLM, ZooLlamaForCausalLM]:
    """transformers' model, and ours with the same weights and random updates of them."""
    torch.manual_seed(0)
    theirs, ours = twins(llama_config(), dtype=torch.float64)
    add_lora(ours, 3, 12.0, **options)
    with torch.no_grad():
        for tensor in trained_parameters(ours).values():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return theirs, ours


@pytest.mark.parametrize(
    "options",
    [{}, {"match": ["q_proj", "v_proj"]}, {"match": "model.layers.1.mlp.*"}, {"train_norms": True}],
    ids=["all", "names", "one-layer", "norms"],
)
def test_peft_opens_it_on_the_plain_model_and_gives_the_same_logits(options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    theirs, ours = updated(**options)
    plain = theirs(IDS).logits
    save_adapter(ours, tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert relative_error(opened(IDS).logits, ours(IDS).logits) < CLOSE
    assert relative_error(plain, ours(IDS).logits) > 1e-2
    merged = opened.merge_and_unload()
    merge_lora(ours)
    assert relative_error(merged(IDS).logits, ours(IDS).logits) < CLOSE


def test_an_adapter_that_peft_wrote_is_read(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs, ours = twins(llama_config(), dtype=torch.float64)
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["k_proj", "down_proj"], lora_dropout=0.05)
    trained = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    trained.save_pretrained(tmp_path)
    adapter = open_adapter(tmp_path)
    assert (adapter.r, adapter.alpha, adapter.others) == (4, 10.0, ())
    add_lora(ours, adapter.r, adapter.alpha, adapter.layers)
    load_lora(ours, adapter.read())
    assert len(lora_layers(ours)) == 4
    assert relative_error(ours(IDS).logits, trained.eval()(IDS).logits) < CLOSE


def test_the_files_are_laid_out_as_peft_documents(tmp_path: Path) -> None:
    _, ours = updated(match=["q_proj"])
    save_adapter(ours, tmp_path / "adapter", "some/base")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 12.0)
    assert config["target_modules"] == ["q_proj"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    assert tensors.keys() == {prefix.format(layer, factor) for layer in (0, 1) for factor in "AB"}
    assert torch.equal(tensors[prefix.format(1, "B")], ours.model.layers[1].self_attn.q_proj.lora_B)


def test_what_was_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    _, ours = updated(train_norms=True)
    adapter = open_adapter(save_adapter(ours, tmp_path / "adapter"))
    stored = adapter.read()
    assert stored.keys() == trained_parameters(ours).keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in trained_parameters(ours).items())
    assert set(adapter.layers) == set(lora_layers(ours))
    assert "model.norm.weight" in adapter.others


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(updated()[1], tmp_path_factory.mktemp("written") / "adapter")


def changed(written: Path, folder: Path, **fields: Any) -> Path:
    """A copy of an adapter whose config says something else."""
    config = json.loads((written / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(written / "adapter_model.safetensors"), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_rslora": True}, "use_rslora=True, which is not computed here"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern="),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "changes the base model's weights"),
        ({"peft_type": "IA3"}, "peft_type IA3. Expected LORA"),
        ({"r": 5}, "says r=5"),
        ({"r": "3"}, "Expected a rank and a number"),
    ],
)
def test_what_is_not_computed_here_is_refused_in_one_line(
    fields: dict[str, Any], message: str, written: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        open_adapter(changed(written, tmp_path, **fields))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_and_damaged_files_are_named(written: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no adapter folder"):
        open_adapter(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"Cannot read '.*adapter_config\.json'.*PEFT's format\.$"):
        open_adapter(tmp_path)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    changed(written, tmp_path / "run" / "adapter")
    with pytest.raises(UserError, match=rf"Did you mean '{tmp_path}/run/adapter'\?"):
        open_adapter(tmp_path / "run")
    changed(written, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: each for name, each in tensors.items() if name != first}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="has no lora_B for model"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"12")
    with pytest.raises(UserError, match="incomplete or damaged"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        open_adapter(tmp_path)


def test_an_adapter_replaces_an_earlier_one_and_leaves_other_files(written: Path, tmp_path: Path) -> None:
    _, ours = updated(match=["q_proj"])
    changed(written, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    save_adapter(ours, tmp_path)
    assert len(open_adapter(tmp_path).layers) == 2
    assert (tmp_path / "README.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
