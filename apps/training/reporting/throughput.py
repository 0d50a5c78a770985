"""How much of the device a run uses: the model's FLOPs for each token, the peaks of known devices, what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends.routing_table import count_text

# Dense peaks in TFLOP/s as NVIDIA states them: matrix units in bfloat16, summed in float32, and ordinary units in
# float32. Data sheets of each card, without what they call sparsity (half of the figure they print first); for GeForce
# and RTX cards the appendices of the whitepapers on GA102, Ada and Blackwell.
# The first entry whose every word is in the device's name counts.
PEAKS = {
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "GH200": {"bfloat16": 989.4, "float32": 66.9},
    "H200": {"bfloat16": 989.4, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.2},
    "H100 NVL": {"bfloat16": 835.0, "float32": 60.0},
    "H100": {"bfloat16": 989.4, "float32": 66.9},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "A30": {"bfloat16": 165.0, "float32": 10.3},
    "L40S": {"bfloat16": 362.0, "float32": 91.6},
    "L4": {"bfloat16": 121.0, "float32": 30.3},
    "A10": {"bfloat16": 125.0, "float32": 31.2},
    "RTX 5090": {"bfloat16": 209.5, "float32": 104.8},
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


@dataclass(frozen=True)
class Efficiency:
    """What the steps of a run are measured by.

    flops: of the model in one step, all workers together. peak: of all their devices, in FLOP/s. floor: seconds that
    the step takes at the least (apps/training/floor.py). The last two are None where they are not known.
    """

    flops: float
    peak: float | None = None
    floor: float | None = None

    def utilisation(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of a step: the share of the peak that the model's own arithmetic took."""
        return None if self.peak is None else self.flops / seconds / self.peak

    def of_floor(self, seconds: float) -> float | None:
        """The floor's share of a step's time: 1 is a step that nobody can beat."""
        return None if self.floor is None else self.floor / seconds

    def shares(self, seconds: float) -> dict[str, float]:
        """`mfu` and `of_floor`, as far as they are known."""
        shares = {"mfu": self.utilisation(seconds), "of_floor": self.of_floor(seconds)}
        return {name: share for name, share in shares.items() if share is not None}

    def fields(self, seconds: float) -> dict[str, str]:
        """The same, spelled for the progress line."""
        spelled = {"mfu": "MFU", "of_floor": "of floor"}
        return {spelled[name]: f"{share:.1%}" for name, share in self.shares(seconds).items()}

    def line(self, seconds: float) -> str:
        """What a run with steps of so many seconds came to. Says what is left out, and why."""
        utilisation, share = self.utilisation(seconds), self.of_floor(seconds)
        text = f"Model FLOP/s: {count_text(self.flops / seconds)}"
        if utilisation is None:
            text += " (no MFU: the device's peak is not known, run.peak_flops=… gives it)"
        else:
            text += f", MFU: {utilisation:.1%} of {count_text(self.peak or 0)}"
        return text if share is None else f"{text}, {share:.1%} of the floor"
