"""Models from a config alone: without memory on the meta device, or with random weights that the seed decides."""

import resource

import pytest
import torch
from transformers import LlamaForCausalLM

from modelzoo import build_meta, build_model, load_config
from modelzoo.configuration_transformer import ConfigurationTransformer
from tests.modelzoo.llamas import llama_config


def zoo_config(**changes: object) -> object:
    return ConfigurationTransformer().transform(llama_config(**changes))


def test_a_70b_model_without_weights_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_meta(load_config(config_name="llama-3.1-70b"), torch.bfloat16)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200  # MiB; the weights would be 141,000
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_building_leaves_the_config_and_the_default_dtype_alone() -> None:
    config = zoo_config()
    before = config.to_dict()
    build_meta(config, torch.bfloat16)
    assert config.to_dict() == before
    assert torch.get_default_dtype() == torch.float32


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (build_model(zoo_config(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_weights_do_not_depend_on_the_dtype_or_the_global_generator() -> None:
    exact = build_model(zoo_config(), dtype=torch.float64).state_dict()
    torch.manual_seed(99)
    rounded = build_model(zoo_config(), dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(exact[name].to(torch.bfloat16), rounded[name]) for name in exact)


def test_the_weights_do_not_depend_on_the_number_of_layers() -> None:
    small, large = (build_model(zoo_config(num_hidden_layers=n)).state_dict() for n in (1, 3))
    assert all(torch.equal(small[name], large[name]) for name in small)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_distributed_as_in_transformers(tied: bool) -> None:
    changes = {"tie_word_embeddings": tied, "attention_bias": True, "pad_token_id": 3, "initializer_range": 0.05}
    sizes = {"hidden_size": 128, "intermediate_size": 200, "vocab_size": 200}
    ours = build_model(zoo_config(**sizes, **changes))
    theirs = LlamaForCausalLM(llama_config(**sizes, **changes))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    for name, expected in theirs.named_parameters():
        actual = ours.get_parameter(name)
        if expected.std() == 0:  # norms and biases
            assert torch.equal(actual, expected), name
        else:
            assert actual.mean().item() == pytest.approx(0, abs=0.002), name
            assert actual.std().item() == pytest.approx(expected.std().item(), rel=0.05), name
    assert not ours.model.embed_tokens.weight[3].any()


def test_progress_counts_every_number() -> None:
    calls: list[tuple[int, int]] = []
    model = build_model(zoo_config(), progress=lambda done, total: calls.append((done, total)))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert calls == sorted(calls)
    assert calls[-1] == (count, count)


def test_no_two_matrices_are_alike() -> None:
    weights = build_model(zoo_config(num_key_value_heads=4)).state_dict()
    square = [weight for weight in weights.values() if weight.shape == (32, 32)]
    assert len(square) == 8
    assert all(not torch.equal(a, b) for i, a in enumerate(square) for b in square[:i])


def test_a_built_model_is_ready_to_train() -> None:
    model = build_model(zoo_config(), dtype="float32")
    assert model.training
    input_ids = torch.randint(0, 61, (1, 8))
    model(input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
