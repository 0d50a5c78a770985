"""The names of a model's parts, for whoever runs it part by part instead of calling forward."""

from typing import NamedTuple


class Stages(NamedTuple):
    """Submodule paths of a causal language model, in the order they run.

    embed: input_ids [B, S] -> hidden states [B, S, D] in the residual dtype.
    blocks: (hidden states, cos [S, head_dim], sin, articles) -> hidden states; pure functions of tensors.
    norm: hidden states -> normed hidden states in the compute dtype.
    head: normed hidden states -> logits [B, S, V] in the compute dtype.
    """

    embed: str
    blocks: list[str]
    norm: str
    head: str
