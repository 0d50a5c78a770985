"""load_config finds named configs and folders, and says in one line what is wrong with others."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backends.errors import UserError
from modelzoo import load_config
from tests.modelzoo.llamas import llama_config

OLD_STYLE = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}


def folder_with(tmp_path: Path, values: Any) -> Path:
    (tmp_path / "config.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return tmp_path


def test_a_folder_is_read_like_a_name(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, llama_config().to_dict())
    by_name = load_config(config_name=folder, article_attention=True)
    assert by_name.hidden_size == 32
    assert by_name.article_attention
    assert load_config(model_name_or_path=folder).hidden_size == 32


def test_a_config_json_of_old_transformers_is_understood(tmp_path: Path) -> None:
    config = load_config(model_name_or_path=folder_with(tmp_path, OLD_STYLE))
    assert config.rope_parameters == {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert config.num_key_value_heads == config.num_attention_heads == 32
    assert config.head_dim == 128


@pytest.mark.parametrize("given", [{}, {"config_name": "demo", "model_name_or_path": "demo"}])
def test_exactly_one_source(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"exactly one of checkpoint\.config_name or checkpoint\.model_name_or_path"):
        load_config(**given)


def test_a_misspelt_name_is_recognised() -> None:
    with pytest.raises(UserError, match=r"'llama-2-7B-hf'.*Did you mean 'llama-2-7b'\? Available: clm-1\.1b, "):
        load_config(config_name="llama-2-7B-hf")


def test_a_mistake_is_told_before_transformers_is_imported() -> None:
    program = (
        "import sys, modelzoo\ntry: modelzoo.load_config(config_name='lama')\n"
        "except ValueError as error: assert 'Unknown model' in str(error)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(UserError, match="no folder 'nowhere'"):
        load_config(model_name_or_path="nowhere")
    with pytest.raises(UserError, match=r"use checkpoint\.config_name=demo"):
        load_config(model_name_or_path="demo")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json.*folder\.$"):
        load_config(config_name=tmp_path)


def test_an_adapter_without_its_base_is_told_what_makes_a_model_of_it(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for given in (tmp_path, tmp_path / "adapter"):
        with pytest.raises(UserError, match=r"/adapter' is a LoRA adapter: apps/merge_lora\.py"):
            load_config(model_name_or_path=given)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{not json", "as JSON"),
        ("[1]", "holds a list"),
        ({}, "has no model_type. Expected one of: llama"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"model_type": "gemma2"}, "Unknown model type in .* 'gemma2'. Available: llama."),
        ({"model_type": "llama", "hidden_size": "big"}, "not a valid LlamaConfig.*hidden_size"),
        ({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}, "not a valid LlamaConfig.*33"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"model_type": "llama", "num_key_value_heads": 0}, "num_key_value_heads is 0. Expected at least 1"),
        ({"model_type": "llama", "intermediate_size": -8}, "intermediate_size is -8. Expected at least 1"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"model_type": "llama", "head_dim": 7}, "head_dim.*7"),
        ({"model_type": "llama", "vocab_size": 9, "pad_token_id": 9}, "pad_token_id is 9. Expected a token below"),
        ({"model_type": "llama", "hidden_act": "silo"}, "Did you mean 'silu'"),
        ({"model_type": "llama", "attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "is quantized"),
        ({"model_type": "llama", "architectures": ["LlamaForTokenClassification"]}, "Available: LlamaForCausalLM"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    ],
)
def test_each_bad_config_is_one_line(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(UserError, match=told) as raised:
        load_config(config_name=folder_with(tmp_path, content))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"compute_type": "float32"}, "Unknown zoo argument 'compute_type'. Did you mean 'compute_dtype'"),
        ({"norm_dtype": "float23"}, "Did you mean 'float32'"),
        ({"article_attention": "yes"}, "Expected true or false"),
        ({"max_seq_length": 0}, "at least 1"),
        ({"max_seq_length": 2000}, r"2000 is longer than the 1024 positions .* Use model\.max_seq_length=1024"),
    ],
)
def test_each_bad_zoo_argument_is_one_line(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(config_name="demo", **arguments)
