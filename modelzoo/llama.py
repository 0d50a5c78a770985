"""The zoo Llama: a PreTrainedModel with transformers' parameter names, built of layers that ask a backend.

It loads and saves plain Hugging Face checkpoints, works with `generate()` and Trainer, and offers its parts one by one
(`stages`, `rotary_tables`) to a program that runs them as compiled regions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation import CompileConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from backends.articles import article_mask
from backends.errors import UserError
from backends.kernels.inference import inference_kernels
from backends.precision import PrecisionPolicy, as_torch
from modelzoo.dropout import name_dropouts
from modelzoo.llama_block import (
    ZooLlamaDecoderLayer,
    ZooLlamaEmbedding,
    ZooLlamaRMSNorm,
    chosen_dtype,
    make_linear,
)
from modelzoo.llama_config import ZooLlamaConfig
from modelzoo.recorded_decoding import RecordedDecoding
from modelzoo.rotary import rotary_tables
from modelzoo.stages import Stages


class ZooLlamaPreTrainedModel(PreTrainedModel):
    """What transformers wants to know about the zoo Llama."""

    config_class = ZooLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("ZooLlamaDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    # Checkpoints of old transformers hold the rotary frequencies, which the config says.
    _keys_to_ignore_on_load_unexpected = (r"rotary_emb\.inv_freq$",)

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__(config)
        if config._attn_implementation != "sdpa":
            raise UserError(
                f"attn_implementation is '{config._attn_implementation}'. Here the backend that a layer is routed to "
                "computes its attention: leave the argument out."
            )


class ZooLlamaModel(ZooLlamaPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = ZooLlamaEmbedding(config)
        self.layers = nn.ModuleList(ZooLlamaDecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = ZooLlamaRMSNorm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        article_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As transformers' Llama. `article_ids` [B, S] confine attention to articles, in place of attention_mask."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if self.training and self.config.article_attention and article_ids is None:
            raise ValueError("This model was configured with article_attention: training it needs article_ids.")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # Training never reads a cache; transformers makes one all the same, and holds every key and value for nothing.
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        if article_ids is None:
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        else:
            mask = article_mask(article_ids)
        cos, sin = rotary_tables(self.config, position_ids, self.compute_dtype)

        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        kept = []
        with _kernels_for(past_key_values, hidden_states):
            for index, layer in enumerate(self.layers):
                if keep:
                    kept.append(hidden_states)
                update = None if past_key_values is None else partial(past_key_values.update, layer_idx=index)
                hidden_states = layer(hidden_states, cos, sin, None, mask, update)
            hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
            hidden_states=(*kept, hidden_states) if keep else None,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of products: the config's, or the parameters'."""
        return chosen_dtype(self.config.compute_dtype) or self.norm.weight.dtype


def _kernels_for(past_key_values: Cache | None, hidden_states: Tensor) -> AbstractContextManager[None]:
    """Fused kernels with a cache of fixed size, the form for writing text fast; op for op transformers without."""
    if torch.compiler.is_compiling() or not isinstance(past_key_values, StaticCache):
        return nullcontext()
    return inference_kernels(hidden_states)


class ZooLlamaForCausalLM(ZooLlamaPreTrainedModel, GenerationMixin):
    """The zoo Llama with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers reads a dict)

    def __init__(self, config: ZooLlamaConfig) -> None:
        super().__init__(config)
        self.model = ZooLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = make_linear(config, config.hidden_size, config.vocab_size)
        name_dropouts(self)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        article_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] in the compute dtype and, given labels [B, S] (-100: not counted), the loss.

        The loss is the mean over counted tokens, or their sum over `num_items_in_batch`, in the logits dtype.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            article_ids=article_ids,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = causal_lm_loss(logits.to(as_torch(self.precision.logits)), labels, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., CausalLMOutputWithPast]:
        """What `generate()` calls for each token behind the prompt, on a GPU with a static cache: a recorded forward.

        transformers would compile one, which takes longer than most texts. Who asks for it with a `compile_config`
        gets it.
        """
        if compile_config is not None:
            compiled: Callable[..., CausalLMOutputWithPast] = super().get_compiled_call(compile_config)
            return compiled
        # Dynamic scaling has other tables for each length, made from a number that has to be read from the device.
        is_dynamic = self.config.rope_parameters["rope_type"] == "dynamic"
        is_spread = len({parameter.device for parameter in self.parameters()}) > 1  # a recording is of one device
        return self.__call__ if is_dynamic or is_spread else RecordedDecoding(self)

    @property
    def precision(self) -> PrecisionPolicy:
        """The dtype of every kind of tensor, by the config and the parameters as they are now."""
        return self.config.precision(str(self.dtype).removeprefix("torch."))

    def stages(self) -> Stages:
        """The paths of the parts that forward runs one after another."""
        blocks = [f"model.layers.{index}" for index in range(len(self.model.layers))]
        return Stages(embed="model.embed_tokens", blocks=blocks, norm="model.norm", head="lm_head")

    def rotary_tables(self, seq_len: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions 0 … seq_len-1, each [seq_len, head_dim] in the compute dtype, as blocks want them."""
        positions = torch.arange(seq_len, device=device)
        return rotary_tables(self.config, positions, self.model.compute_dtype, seq_len)


def causal_lm_loss(logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None) -> Tensor:
    """Cross entropy of logits [B, S, V] against the next label; transformers' rule, in the dtype of `logits`.

    transformers always computes it in float32, also for a float64 model.
    """
    targets = F.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / torch.as_tensor(num_items_in_batch, device=loss.device)


AutoConfig.register(ZooLlamaConfig.model_type, ZooLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(ZooLlamaConfig, ZooLlamaForCausalLM, exist_ok=True)
