"""`generate()` on the zoo Llama gives transformers' tokens: greedy, sampled, padded, continued, with any cache."""

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from modelzoo.llama import ZooLlamaForCausalLM
from tests.modelzoo.llamas import ROPES, llama_config, twins

Twins = tuple[LlamaForCausalLM, ZooLlamaForCausalLM]


@pytest.fixture(scope="module", params=ROPES, ids=lambda rope: rope["rope_type"])
def models(request: pytest.FixtureRequest) -> Twins:
    torch.manual_seed(0)
    config = llama_config(rope_parameters=dict(request.param), max_position_embeddings=24, eos_token_id=None)
    return twins(config)


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows; the first is padded on the left."""
    input_ids = torch.randint(1, 61, (2, 9))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :4] = 0
    return input_ids, attention_mask


def test_greedy_equals_transformers(models: Twins) -> None:
    input_ids, attention_mask = prompt()
    theirs, ours = (
        model.generate(input_ids, attention_mask=attention_mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
        for model in models
    )
    assert ours.shape == (2, 33)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("choice", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}])
def test_sampling_equals_transformers(models: Twins, choice: dict[str, float]) -> None:
    input_ids, attention_mask = prompt()
    drawn = []
    for model in models:
        torch.manual_seed(3)
        options = {"max_new_tokens": 16, "do_sample": True, "pad_token_id": 0, **choice}
        drawn.append(model.generate(input_ids, attention_mask=attention_mask, **options))
    assert torch.equal(*drawn)


def test_a_static_cache_gives_the_same_tokens(models: Twins) -> None:
    _, ours = models
    input_ids, attention_mask = prompt()
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    growing = ours.generate(input_ids, attention_mask=attention_mask, **options)
    static = ours.generate(input_ids, attention_mask=attention_mask, cache_implementation="static", **options)
    assert torch.equal(static, growing)


def test_the_cache_changes_nothing_but_the_time() -> None:
    _, ours = twins(llama_config(), torch.float64)
    input_ids = torch.randint(0, 61, (2, 20))
    cache = DynamicCache(config=ours.config)
    pieces = [ours(input_ids[:, piece], past_key_values=cache) for piece in (slice(0, 7), slice(7, 8), slice(8, 20))]
    logits = torch.cat([piece.logits for piece in pieces], dim=1)
    torch.testing.assert_close(logits, ours(input_ids).logits, rtol=1e-12, atol=1e-12)


def test_beam_search_equals_transformers() -> None:
    models = twins(llama_config(eos_token_id=None))
    input_ids = torch.randint(1, 61, (1, 6))
    theirs, ours = (
        m.generate(input_ids, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0) for m in models
    )
    assert torch.equal(ours, theirs)
