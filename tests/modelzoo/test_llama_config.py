"""The zoo config: dtypes resolved by rule, and written to disk as the Hugging Face config it came from."""

import json
from pathlib import Path

import pytest

from modelzoo.configuration_transformer import ConfigurationTransformer
from modelzoo.llama_config import ZooLlamaConfig
from tests.modelzoo.llamas import ROPES, llama_config


@pytest.mark.parametrize(
    ("parameters", "norms", "compute"),
    [("bfloat16", "float32", "bfloat16"), ("float32", "float32", "float32"), ("float64", "float64", "float64")],
)
def test_auto_dtypes_follow_the_parameters(parameters: str, norms: str, compute: str) -> None:
    policy = ZooLlamaConfig().precision(parameters)
    assert (policy.norms, policy.logits) == (norms, norms)
    assert (policy.compute, policy.residual) == (compute, compute)


def test_saving_writes_the_plain_hugging_face_config(tmp_path: Path) -> None:
    config = llama_config(rope_parameters=dict(ROPES[3]), head_dim=16, pad_token_id=2)
    config.save_pretrained(tmp_path / "theirs")
    zoo = ConfigurationTransformer().transform(config, article_attention=True, norm_dtype="float64")
    zoo.save_pretrained(tmp_path / "ours")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert ours == theirs
    assert ours["model_type"] == "llama"
    assert ours["architectures"] == ["LlamaForCausalLM"]


def test_a_dynamic_scaling_may_exceed_its_positions() -> None:
    config = ZooLlamaConfig(max_position_embeddings=64, rope_parameters=dict(ROPES[2]), max_seq_length=100)
    assert config.max_seq_length == 100
