"""The named configs are the published models, and asking for their names costs no import."""

import math
import subprocess
import sys

import pytest

from modelzoo import build_meta, load_config, named_configs

PUBLISHED_PARAMETERS = {
    "demo": 5_048_576,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
}
# Millions: without embeddings, and in total.
CLM = {
    "clm-60m": (44.4, 82.1),
    "clm-200m": (186, 262),
    "clm-400m": (361, 456),
    "clm-600m": (566, 680),
    "clm-1.1b": (994, 1145),
}


def test_every_named_config_is_counted_here() -> None:
    assert set(named_configs()) == {*PUBLISHED_PARAMETERS, *CLM}


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_count_is_the_published_one(name: str) -> None:
    model = build_meta(load_config(config_name=name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize("name", CLM)
def test_clm_parameter_counts_are_the_published_ones(name: str) -> None:
    model = build_meta(load_config(config_name=name))
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = model.model.embed_tokens.weight.numel()  # their table counts the head among the blocks' neighbours
    for counted, published in zip((total - 2 * embeddings, total), CLM[name], strict=True):
        digits = 1 if isinstance(published, float) else 0
        assert math.isclose(counted / 1e6, published, abs_tol=0.5001 * 10**-digits)


@pytest.mark.parametrize("name", [*PUBLISHED_PARAMETERS, *CLM])
def test_head_dim_and_rope_are_those_of_the_family(name: str) -> None:
    config = load_config(config_name=name)
    rope = config.rope_parameters
    if name.startswith("llama-3"):
        assert (rope["rope_type"], rope["rope_theta"]) == ("llama3", 500000.0)
        assert rope["factor"] == (32.0 if name == "llama-3.2-1b" else 8.0)
    else:
        assert rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.head_dim == (64 if name.startswith(("clm", "demo", "tiny", "llama-3.2")) else 128)
    assert config.tie_word_embeddings == (name == "llama-3.2-1b")


def test_listing_names_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, modelzoo; modelzoo.named_configs(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
