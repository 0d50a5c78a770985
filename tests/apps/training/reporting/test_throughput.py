"""Model FLOPs against counting the weights of a real model, and the table of peaks."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from apps.training.reporting.throughput import Efficiency, peak_flops, training_flops_per_token


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_six_per_weight_in_a_product_and_causal_attention(tied: bool) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config)
    number = sum(p.numel() for p in model.parameters())
    norms = 7 * 16  # they multiply too, element by element
    products = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear")
    # A query meets half of the keys on average, in two products of 2 FLOPs a number; backward costs twice as much.
    attention = 3 * 3 * 2 * (2 * 16) * (128 / 2)
    assert training_flops_per_token(config, number, 128) == 6 * (products + norms) + attention


def test_peaks_are_found_by_the_names_torch_gives() -> None:
    assert peak_flops("NVIDIA H200", "bfloat16") == pytest.approx(989.4e12)
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") == pytest.approx(66.9e12)
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == pytest.approx(756e12)
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == pytest.approx(312e12)
    assert peak_flops("NVIDIA A10G", "bfloat16") is None
    assert peak_flops("NVIDIA H200", "float64") is None
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16") is None


def test_shares_are_told_where_peak_and_floor_are_known_and_left_out_with_a_reason_elsewhere() -> None:
    bare = Efficiency(flops=3e9)
    assert bare.fields(0.5) == {}
    assert bare.line(0.5) == "Model FLOP/s: 6 G (no MFU: the device's peak is not known, run.peak_flops=… gives it)"
    known = Efficiency(flops=3e9, peak=24e9, floor=0.4)
    assert known.fields(0.5) == {"MFU": "25.0%", "of floor": "80.0%"}
    assert known.line(0.5) == "Model FLOP/s: 6 G, MFU: 25.0% of 24 G, 80.0% of the floor"
