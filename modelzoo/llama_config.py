"""The zoo Llama's config: everything a Hugging Face Llama config holds, plus what only the zoo knows."""

from __future__ import annotations

import os
from typing import Any

from transformers import LlamaConfig

from backends.errors import UserError
from backends.precision import PrecisionPolicy, resolve

DROPOUTS = ("drop_attention", "drop_residual", "drop_embedding")


class ZooLlamaConfig(LlamaConfig):
    """A LlamaConfig with the zoo's arguments.

    compute_dtype, norm_dtype, residual_dtype, logits_dtype: "auto", "float32", "bfloat16" or "float64". "auto" follows
    the parameters' dtype; norms and logits are at least float32.
    article_attention: a token attends inside its own article only; forward then wants article_ids while training.
    drop_attention, drop_residual, drop_embedding: shares dropped while training of the attention weights, of what each
    block adds to the residual stream, of the embedding; from 0 to below 1. (A plain config has attention_dropout.)
    max_seq_length: the sequence length it is trained with, or None. Raises UserError for a value that cannot be.
    """

    model_type = "zoo_llama"

    compute_dtype: str = "auto"
    norm_dtype: str = "auto"
    residual_dtype: str = "auto"
    logits_dtype: str = "auto"
    article_attention: bool = False
    drop_attention: float = 0.0
    drop_residual: float = 0.0
    drop_embedding: float = 0.0
    max_seq_length: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.precision("float32")  # complains about a dtype that there is not
        if not isinstance(self.article_attention, bool):
            raise UserError(f"article_attention is {self.article_attention!r}. Expected true or false.")
        for name in DROPOUTS:
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise UserError(f"{name} is {share!r}. Expected a number from 0 to below 1.")
        self._check_max_seq_length()

    def precision(self, parameters: str) -> PrecisionPolicy:
        """The dtypes of a model of this config whose parameters have the dtype called `parameters`."""
        return resolve(
            parameters,
            compute=self.compute_dtype,
            norms=self.norm_dtype,
            residual=self.residual_dtype,
            logits=self.logits_dtype,
        )

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What transformers reads config.json with: a Llama's is ours."""
        values, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = values.get("model_type", cls.model_type)
        if model_type not in (LlamaConfig.model_type, cls.model_type):
            raise UserError(f"'{pretrained_model_name_or_path}' is a model of type '{model_type}'. Expected 'llama'.")
        return {**values, "model_type": cls.model_type}, unused

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the plain Hugging Face config.json, which transformers reads without this project."""
        from modelzoo.configuration_transformer import ConfigurationTransformer

        ConfigurationTransformer().restore(self).save_pretrained(save_directory, **kwargs)

    def _check_max_seq_length(self) -> None:
        length = self.max_seq_length
        if length is None:
            return
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise UserError(f"max_seq_length is {length!r}. Expected a whole number of at least 1.")
        # The dynamic scaling is made for sequences longer than the model's own.
        if length > self.max_position_embeddings and self.rope_parameters["rope_type"] != "dynamic":
            raise UserError(
                f"Sequence length {length} is longer than the {self.max_position_embeddings} positions of this model "
                f"(max_position_embeddings). Use model.max_seq_length={self.max_position_embeddings} or less."
            )
