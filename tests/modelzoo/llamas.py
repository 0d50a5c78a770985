"""Small Llamas for the tests of the zoo: transformers' and ours, with the same random weights."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from modelzoo.configuration_transformer import ConfigurationTransformer
from modelzoo.llama import ZooLlamaForCausalLM

# transformers normalises and computes the loss in float32 whatever the model's dtype.
AS_TRANSFORMERS = {"norm_dtype": "float32", "logits_dtype": "float32"}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPES = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0},
    LLAMA3_ROPE,
]


def llama_config(**changes: Any) -> LlamaConfig:
    """A Llama of some thousand parameters: 2 layers, 4 heads in 2 groups of 8 channels."""
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # large enough that a wrong operation shows in the logits
        "architectures": ["LlamaForCausalLM"],
    }
    return LlamaConfig(**{**sizes, **changes})


def twins(
    config: LlamaConfig, dtype: torch.dtype = torch.float32, **zoo_arguments: Any
) -> tuple[LlamaForCausalLM, ZooLlamaForCausalLM]:
    """transformers' model and the zoo's, with equal weights; every parameter is random, biases and norms too."""
    theirs = LlamaForCausalLM._from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("bias", "norm.weight", "layernorm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = ZooLlamaForCausalLM._from_config(ConfigurationTransformer().transform(config, **zoo_arguments), dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, relative to the largest magnitude of `theirs`."""
    scale = theirs.abs().max().clamp_min(torch.finfo(theirs.dtype).tiny)
    return float((ours - theirs).detach().abs().max() / scale.detach())


@st.composite
def llama_configs(draw: st.DrawFn) -> LlamaConfig:
    """Any small Llama: grouped heads, explicit head_dim, biases, tied embeddings, every rope scaling."""
    heads = draw(st.sampled_from([1, 2, 4, 6]))
    return llama_config(
        vocab_size=draw(st.integers(5, 70)),
        hidden_size=heads * draw(st.integers(1, 8)),
        intermediate_size=draw(st.integers(1, 48)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=heads,
        num_key_value_heads=draw(st.sampled_from([kv for kv in (1, 2, 3, 4, 6) if heads % kv == 0])),
        head_dim=draw(st.sampled_from([4, 6, 8, 16])),  # not 2: the dynamic scaling divides by head_dim - 2
        hidden_act=draw(st.sampled_from(["silu", "gelu", "relu"])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        pad_token_id=draw(st.sampled_from([None, 0, 3])),
        rope_parameters=dict(draw(st.sampled_from(ROPES))),
        max_position_embeddings=draw(st.sampled_from([32, 64])),
    )
