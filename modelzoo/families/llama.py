"""Llama 2, 3, 3.1, 3.2, TinyLlama, clm: everything whose config.json says `"model_type": "llama"`."""

from typing import Any

from transformers import LlamaConfig
from transformers.activations import ACT2FN

from backends.errors import UserError, unknown
from modelzoo.families import Family
from modelzoo.llama_config import DROPOUTS, ZooLlamaConfig
from modelzoo.rotary import ROPE_TYPES

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check(config: LlamaConfig) -> None:
    """Raise UserError for a Llama config that asks for something the zoo Llama does not compute."""
    for name in _SIZES:
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}. Expected at least 1.")
    padding = config.pad_token_id
    if padding is not None and not -config.vocab_size <= padding < config.vocab_size:
        raise UserError(f"pad_token_id is {padding}. Expected a token below vocab_size={config.vocab_size}, or null.")
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in ROPE_TYPES:
        raise unknown("rope scaling type", rope_type, ROPE_TYPES)
    if config.hidden_act not in ACT2FN:
        raise unknown("activation function", config.hidden_act, sorted(ACT2FN))
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"num_attention_heads is {config.num_attention_heads}, num_key_value_heads {config.num_key_value_heads}. "
            "Expected the first to be a multiple of the second."
        )
    if config.head_dim % 2:
        raise UserError(f"head_dim is {config.head_dim}. Expected an even number: positions turn pairs of channels.")
    if config.attention_dropout:
        raise UserError(
            f"attention_dropout is {config.attention_dropout} in config.json. Dropout belongs to the training: "
            "set it to 0 there, and use model.attention_dropout."
        )
    if getattr(config, "quantization_config", None):
        raise UserError("The checkpoint is quantized (quantization_config). Expected plain weights: dequantize it.")


def _model() -> type[Any]:
    from modelzoo.llama import ZooLlamaForCausalLM

    return ZooLlamaForCausalLM


FAMILY = Family(
    hf_config=LlamaConfig,
    zoo_config=ZooLlamaConfig,
    architectures={"LlamaForCausalLM": "ZooLlamaForCausalLM"},
    zoo_arguments=(
        "compute_dtype",
        "norm_dtype",
        "residual_dtype",
        "logits_dtype",
        "article_attention",
        *DROPOUTS,
        "max_seq_length",
    ),
    check=check,
    model=_model,
)
