"""Factors multiplied back: transformers alone reads the folder and computes the same."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

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
