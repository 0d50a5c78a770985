"""The zoo Llama's parts: embedding, RMSNorm, attention, MLP and the block made of them.

Op for op transformers' Llama with attn_implementation="sdpa", so that float32 logits are bit-identical; linears and
attention go through a backend. No part knows its layer's index: equal blocks are equal objects, and a program over
regions captures one of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from backends.joint import joint_linear
from backends.kernels.inference import add_rms_norm, gated_silu
from backends.kernels.rms_norm import rms_norm
from backends.layers import BackendAttention, BackendLinear
from backends.precision import as_torch
from modelzoo.dropout import make_dropout
from modelzoo.llama_config import ZooLlamaConfig
from modelzoo.rotary import rotate

CacheUpdate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chosen_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a config's dtype field; None for "auto", which follows the parameters at every call."""
    return None if name == "auto" else as_torch(name)


def make_linear(config: ZooLlamaConfig, in_features: int, out_features: int, bias: bool = False) -> BackendLinear:
    """A linear layer in the config's compute dtype."""
    layer = BackendLinear(in_features, out_features, bias=bias)
    layer.compute_dtype = chosen_dtype(config.compute_dtype)
    return layer


class ZooLlamaEmbedding(nn.Embedding):
    """input_ids [B, S] -> hidden states [B, S, D] in the residual dtype ("auto": the parameters')."""

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.residual_dtype = chosen_dtype(config.residual_dtype)
        self.dropout = make_dropout(config.drop_embedding)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = super().forward(input_ids)
        hidden_states = hidden_states.to(self.residual_dtype or hidden_states.dtype)
        return hidden_states if self.dropout is None else self.dropout(hidden_states)


class ZooLlamaRMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv 1910.07467), normalised in the norm dtype and returned in the compute dtype."""

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.variance_epsilon = config.rms_norm_eps
        self.norm_dtype = chosen_dtype(config.norm_dtype)
        self.compute_dtype = chosen_dtype(config.compute_dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] in any dtype -> [..., D] in the compute dtype."""
        return rms_norm(hidden_states, *self._options())

    def behind_sum(self, residual: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """(residual + update in the dtype of residual, that sum normalised), both [..., D]."""
        is_watched = self._forward_hooks or self._forward_pre_hooks  # by who wants to see a call
        fused = None if is_watched else add_rms_norm(residual, update, *self._options())
        if fused is not None:
            return fused
        total = residual + update.to(residual.dtype)
        return total, self(total)

    def _options(self) -> tuple[Tensor, float, torch.dtype, torch.dtype]:
        norm_dtype = self.norm_dtype or torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight, self.variance_epsilon, norm_dtype, self.compute_dtype or self.weight.dtype

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class ZooLlamaAttention(BackendAttention):
    """Causal self-attention with grouped key-value heads (arXiv 2305.13245) and rotary positions."""

    same_input = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__(config.num_attention_heads, config.head_dim)
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.scaling = config.head_dim**-0.5
        self.q_proj = make_linear(config, config.hidden_size, queries, config.attention_bias)
        self.k_proj = make_linear(config, config.hidden_size, keys, config.attention_bias)
        self.v_proj = make_linear(config, config.hidden_size, keys, config.attention_bias)
        self.o_proj = make_linear(config, queries, config.hidden_size, config.attention_bias)
        self.dropout = make_dropout(config.drop_attention)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        articles: Tensor | None,
        mask: Tensor | None,
        cache_update: CacheUpdate | None,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D]. See ZooLlamaDecoderLayer for the other arguments."""
        q, k, v = joint_linear(self, x)
        # v outlives the product, and as a range of its columns would keep q and k alive with it
        q, k, v = self._heads(q), self._heads(k), self._heads(v.contiguous())
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache_update is not None:
            k, v = cache_update(k, v)
        is_causal = mask is None and q.shape[2] > 1
        out = self.attend(
            q, k, v, mask=mask, scale=self.scaling, is_causal=is_causal, articles=articles, drop=self.dropout
        )
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:-1], -1))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads · head_dim] -> [B, heads, S, head_dim]."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


class ZooLlamaMLP(nn.Module):
    """The gated MLP, SwiGLU in every published Llama (arXiv 2002.05202)."""

    same_input = ("gate_proj", "up_proj")

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = make_linear(config, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.up_proj = make_linear(config, config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = make_linear(config, config.intermediate_size, config.hidden_size, config.mlp_bias)
        # The plain function where there is one: transformers' SiLU module would be one more submodule per layer.
        self.act_fn = F.silu if config.hidden_act in ("silu", "swish") else ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        gate, up = joint_linear(self, x)
        gated = gated_silu(gate, up) if self.act_fn is F.silu else None
        return self.down_proj(self.act_fn(gate) * up if gated is None else gated)


class ZooLlamaDecoderLayer(GradientCheckpointingLayer):
    """One block: a pure function of tensors, but for the backends' state and the cache it is lent."""

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__()
        self.self_attn = ZooLlamaAttention(config)
        self.mlp = ZooLlamaMLP(config)
        self.input_layernorm = ZooLlamaRMSNorm(config)
        self.post_attention_layernorm = ZooLlamaRMSNorm(config)
        self.attention_dropout = make_dropout(config.drop_residual)
        self.mlp_dropout = make_dropout(config.drop_residual)

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        articles: Tensor | None = None,
        mask: Tensor | None = None,
        cache_update: CacheUpdate | None = None,
    ) -> Tensor:
        """hidden states [B, S, D] in the residual dtype -> the same shape and dtype.

        cos, sin: [S, head_dim], or [B, S, head_dim], in the compute dtype. articles: int32 [2, B, S], the spans that
        attention stays inside (`backends.articles`). mask: bool [B, 1, S, S_kv], True = attend. Neither = causal (a
        single query sees every key). cache_update(k, v): returns the keys and values to attend to.
        """
        update = self.self_attn(self.input_layernorm(hidden_states), cos, sin, articles, mask, cache_update)
        if self.attention_dropout is not None:
            update = self.attention_dropout(update)
        hidden_states, normed = self.post_attention_layernorm.behind_sum(hidden_states, update)
        update = self.mlp(normed)
        if self.mlp_dropout is not None:
            update = self.mlp_dropout(update)
        return hidden_states + update.to(hidden_states.dtype)
