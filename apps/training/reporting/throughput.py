"""How much of the device a run uses: the model's FLOPs for each token and the peaks of known devices."""

from __future__ import annotations

from typing import Any

# Dense peaks in TFLOP/s as their makers state them: matrix units in bfloat16, ordinary units in float32.
# The first entry whose every word is in the device's name counts.
PEAKS = {
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "GH200": {"bfloat16": 989.4, "float32": 66.9},
    "H200": {"bfloat16": 989.4, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.2},
    "H100 NVL": {"bfloat16": 835.0, "float32": 60.0},
    "H100": {"bfloat16": 989.4, "float32": 66.9},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.0, "float32": 91.6},
    "L4": {"bfloat16": 121.0, "float32": 30.3},
    "A10": {"bfloat16": 125.0, "float32": 31.2},
    "RTX 4090": {"bfloat16": 165.2, "float32": 82.6},
    "RTX 3090": {"bfloat16": 71.0, "float32": 35.6},
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The peak of a device (named as torch.cuda.get_device_name does) in FLOP/s; None where it is not known."""
    words = set(device_name.lower().replace("-", " ").split())
    for name, peaks in PEAKS.items():
        if words >= set(name.lower().split()) and "laptop" not in words:
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def training_flops_per_token(model_config: Any, num_parameters: int, seq_length: int) -> float:
    """FLOPs of forward and backward for one position: 6 per weight in a product, and causal attention's two products.

    An embedding that is only looked up multiplies nothing; a tied one is the head's matrix and counts once.
    """
    looked_up = 0 if model_config.tie_word_embeddings else model_config.vocab_size * model_config.hidden_size
    width = model_config.num_attention_heads * model_config.head_dim
    attention = 6 * model_config.num_hidden_layers * width * seq_length
    return 6.0 * (num_parameters - looked_up) + attention
