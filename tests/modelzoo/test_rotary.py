"""Rotary tables equal transformers' for every scaling, and depend on the sequence alone."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from modelzoo.rotary import inverse_frequencies, rotary_tables, rotate
from tests.modelzoo.llamas import ROPES, llama_config

SCALINGS = pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])


@SCALINGS
@pytest.mark.parametrize("length", [1, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tables_are_bit_identical_to_transformers(rope: dict[str, float], length: int, dtype: torch.dtype) -> None:
    config = llama_config(rope_parameters=dict(rope), max_position_embeddings=32)
    positions = torch.arange(length)[None]
    expected = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions)
    actual = rotary_tables(config, positions, dtype)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))
    assert actual[0].dtype == dtype


@SCALINGS
def test_old_config_keys_mean_the_same(rope: dict[str, float]) -> None:
    values = dict(rope)
    old = {"rope_theta": values.pop("rope_theta")}
    if values["rope_type"] != "default":
        values["type"] = values.pop("rope_type")
        old["rope_scaling"] = values
    new = inverse_frequencies(llama_config(rope_parameters=dict(rope)), 100)
    assert torch.equal(inverse_frequencies(llama_config(**old), 100), new)


def test_dynamic_scaling_forgets_a_longer_sequence() -> None:
    config = llama_config(rope_parameters=dict(ROPES[2]), max_position_embeddings=32)
    short = torch.arange(40)
    before = rotary_tables(config, short, torch.float32)
    rotary_tables(config, torch.arange(90), torch.float32)
    after = rotary_tables(config, short, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_rotation_keeps_lengths_and_relative_angles() -> None:
    config = llama_config(head_dim=16)
    cos, sin = rotary_tables(config, torch.arange(30), torch.float64)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64).expand(2, 1, 1, 30, 16)
    turned_q, turned_k = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = (turned_q @ turned_k.mT)[0, 0]  # of one q and one k at every pair of positions
    for distance in (-7, 0, 3):
        along = scores.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-5, atol=1e-5)


def test_rows_may_have_positions_of_their_own() -> None:
    config = llama_config()
    positions = torch.tensor([[0, 1, 2], [5, 6, 7]])
    x = torch.randn(2, 4, 3, 8)
    together = rotate(x, *rotary_tables(config, positions, torch.float32))
    for row in (0, 1):
        alone = rotate(x[row : row + 1], *rotary_tables(config, positions[row], torch.float32))
        assert torch.equal(together[row : row + 1], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own_positions", [False, True])
def test_the_gradient_has_the_bits_of_autograds(dtype: torch.dtype, own_positions: bool) -> None:
    positions = torch.arange(5)[None] + torch.tensor([[0], [7]]) if own_positions else torch.arange(5)
    cos, sin = rotary_tables(llama_config(), positions, dtype)
    x = torch.randn(2, 4, 5, 8, dtype=dtype, requires_grad=True)
    wide_cos, wide_sin = cos.unsqueeze(-3), sin.unsqueeze(-3)
    expected = x * wide_cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * wide_sin
    found, grad = rotate(x, cos, sin), torch.randn(2, 4, 5, 8, dtype=dtype)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(each, x, grad)[0] for each in (found, expected)))
