"""Factors multiplied back: transformers alone reads the folder and computes the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from backends.errors import UserError
from modelzoo.checkpoint_writing import save_model
from modelzoo.compression import compress_model, expand_model
from tests.modelzoo.compression.test_compressing import batches, pair


@pytest.mark.parametrize(("method", "match"), [("svd", None), ("mimic", None), ("mimic", ["q_proj", "up_proj"])])
def test_an_expanded_model_opens_in_plain_transformers(tmp_path: Path, method: str, match: list[str] | None) -> None:
    _, model = pair(norm_dtype="float32")
    compress_model(model, batches(), method=method, keep=0.5, match=match)
    with torch.no_grad():
        expected = model(**batches(1)[0]).logits
    layers = expand_model(model)
    assert len(layers) == (21 if match is None else 6)
    theirs = AutoModelForCausalLM.from_pretrained(save_model(model, tmp_path / "plain"), dtype=torch.float64).eval()
    assert type(theirs) is LlamaForCausalLM
    with torch.no_grad():
        found = theirs(**batches(1)[0]).logits
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert theirs.config.attention_bias == theirs.config.mlp_bias == (method == "mimic")
    assert not hasattr(theirs.config, "stored_layers")


def test_a_plain_model_has_nothing_to_expand() -> None:
    with pytest.raises(UserError, match="plain one already"):
        expand_model(pair()[1])


QWEN2 = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
QWEN2 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


def test_a_bias_that_the_config_cannot_tell_of_is_refused() -> None:
    """Qwen2 has biases in q, k and v and no setting: transformers would drop o_proj's, and the logits move."""
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN2)).eval()
    compress_model(model, batches(), keep=0.5)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.o_proj' got a bias .* Qwen2Config has no setting"):
        expand_model(model)
    assert model.state_dict().keys() == before.keys()


def test_biases_that_a_model_has_anyway_are_expanded(tmp_path: Path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**QWEN2)).eval()
    compress_model(model, batches(), keep=0.5, match=["q_proj", "k_proj", "v_proj"])
    compress_model(model, batches(), keep=0.5, match=["o_proj", "up_proj"], method="svd_llm")
    with torch.no_grad():
        expected = model(**batches(1)[0]).logits
    assert len(expand_model(model)) == 10
    model.save_pretrained(tmp_path)
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batches(1)[0]).logits, expected, rtol=1e-3, atol=1e-3)
