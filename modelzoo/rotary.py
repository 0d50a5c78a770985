"""Rotary position embedding: the tables of cosines and sines that turn queries and keys by their position.

RoFormer (arXiv 2104.09864, section 3.4.2), with the scalings that Llama checkpoints name in `rope_parameters`. Scaled
frequencies come from transformers' own functions; only "default" has none there.

No table is kept: transformers keeps the dynamic scaling's frequencies from call to call, so that the result of a short
sequence there depends on whether a longer one came before. Here it depends on the sequence alone.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from backends.kernels import inference

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


def inverse_frequencies(config: PreTrainedConfig, seq_len: int) -> Tensor:
    """Angle per position of each pair of channels: float32 [head_dim / 2], on the CPU.

    Always computed on the CPU: `pow` differs by device in the last bit, and checkpoints are compared across devices.
    `seq_len` matters for the dynamic scaling only.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device="cpu") / config.head_dim
        return 1.0 / (rope["rope_theta"] ** exponents)
    # transformers hands the dynamic scaling a tensor once a sequence is longer than the model was trained for, and
    # nothing before: float32 against Python's float64 arithmetic, which differ in the last bits.
    grown = rope["rope_type"] == "dynamic" and seq_len > config.max_position_embeddings
    seq_len_given = torch.tensor(seq_len, device="cpu") if grown else None
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"), seq_len=seq_len_given)
    return frequencies


def rotary_tables(
    config: PreTrainedConfig, position_ids: Tensor, dtype: torch.dtype, seq_len: int | None = None
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [..., S, head_dim] in `dtype`, for position_ids [..., S].

    Angles are float32 whatever `dtype`, as in transformers. `seq_len` is the highest position + 1; when left out it is
    read from position_ids, which only the dynamic scaling needs (it waits for the device).
    """
    if seq_len is None:
        dynamic = config.rope_parameters["rope_type"] == "dynamic"
        seq_len = int(position_ids.max()) + 1 if dynamic else position_ids.shape[-1]
    frequencies = _on_device(inverse_frequencies(config, seq_len), position_ids.device)
    angles = position_ids[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _on_device(frequencies: Tensor, device: torch.device) -> Tensor:
    """`frequencies` on `device`; a GPU is sent equal ones once: within a recording of a CUDA graph it cannot be."""
    if device.type != "cuda" or isinstance(frequencies, FakeTensor) or torch.compiler.is_compiling():
        return frequencies.to(device)
    return _sent(frequencies.numpy().tobytes(), device)


@functools.lru_cache(maxsize=64)
def _sent(content: bytes, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.float32).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [B, heads, S, head_dim] by its positions; cos, sin: [S, head_dim], or [B, S, head_dim] for ragged rows."""
    turned = inference.rotate(x, cos, sin)
    return _Rotation.apply(x, cos, sin) if turned is None else turned


class _Rotation(torch.autograd.Function):
    """With a gradient that has the bits of autograd's, written so that Inductor makes one pass of it instead of two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        cos, sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
        half = x.shape[-1] // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
        return (x * cos) + (turned * sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # [B, S, heads, 2, head_dim / 2]: the order of the projection that x came from. Flipping the halves is a way to
        # read; a concatenation would be written, then read.
        cos, sin = (table.unsqueeze(-2).unflatten(-1, (2, -1)) for table in ctx.saved_tensors)
        grad = grad.transpose(-2, -3).unflatten(-1, (2, -1))
        first, second = sin.unbind(-2)
        turned_back = (grad * torch.stack((-first, second), -2)).flip(-2)
        return (grad * cos + turned_back).flatten(-2).transpose(-2, -3), None, None
