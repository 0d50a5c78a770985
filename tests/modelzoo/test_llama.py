"""The zoo Llama computes what transformers' Llama computes, and its parts are the whole."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from backends.articles import article_spans
from modelzoo.configuration_transformer import ConfigurationTransformer
from modelzoo.llama import ZooLlamaForCausalLM, causal_lm_loss
from modelzoo.llama_config import ZooLlamaConfig
from tests.modelzoo.llamas import AS_TRANSFORMERS, ROPES, llama_config, llama_configs, relative_error, twins

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


@given(
    config=llama_configs(),
    dtype=st.sampled_from(list(TOLERANCE)),
    length=st.sampled_from([1, 2, 17, 40]),
    padded=st.booleans(),
)
@settings(max_examples=40)
def test_logits_loss_and_gradients_equal_transformers(
    config: LlamaConfig, dtype: torch.dtype, length: int, padded: bool
) -> None:
    torch.manual_seed(length)
    theirs, ours = twins(config, dtype, **AS_TRANSFORMERS)
    input_ids = torch.randint(0, config.vocab_size, (2, length))
    attention_mask = torch.ones_like(input_ids)
    if padded and length > 2:
        attention_mask[0, :2] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, -1] = 1  # at least one counted token
    expected = theirs(input_ids, attention_mask=attention_mask, labels=labels)
    actual = ours(input_ids, attention_mask=attention_mask, labels=labels)
    assert actual.logits.dtype == dtype
    assert relative_error(actual.logits, expected.logits) <= TOLERANCE[dtype]
    if length == 1:
        return  # no next token: both losses are NaN
    assert relative_error(actual.loss, expected.loss) <= TOLERANCE[dtype]
    expected.loss.backward()
    actual.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert set(gradients) == {name for name, _ in theirs.named_parameters()}
    for name, parameter in theirs.named_parameters():
        assert relative_error(gradients[name], parameter.grad) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_logits_are_bit_identical_to_transformers(dtype: torch.dtype, rope: dict[str, float]) -> None:
    theirs, ours = twins(llama_config(rope_parameters=dict(rope)), dtype)
    input_ids = torch.randint(0, 61, (2, 50))
    expected, actual = theirs(input_ids, labels=input_ids), ours(input_ids, labels=input_ids)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.loss, expected.loss)


def test_in_float64_the_loss_is_float64_where_transformers_rounds_to_float32() -> None:
    theirs, ours = twins(llama_config(), torch.float64, norm_dtype="float32")
    input_ids = torch.randint(0, 61, (2, 20))
    logits = theirs(input_ids).logits
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 61), input_ids[:, 1:].reshape(-1))
    actual = ours(input_ids, labels=input_ids).loss
    assert actual.dtype == torch.float64
    assert relative_error(actual, expected) < 1e-15


def test_float64_by_default_normalises_in_float64() -> None:
    theirs, ours = twins(llama_config(), torch.float64)
    input_ids = torch.randint(0, 61, (1, 20))
    difference = relative_error(ours(input_ids).logits, theirs(input_ids).logits)
    assert 1e-12 < difference < 1e-5  # the float32 norms of transformers, and nothing else


def test_loss_over_a_given_number_of_tokens_equals_transformers() -> None:
    theirs, ours = twins(llama_config())
    input_ids = torch.randint(0, 61, (2, 20))
    for count in (7, torch.tensor(7)):
        expected = theirs(input_ids, labels=input_ids, num_items_in_batch=count).loss
        assert torch.equal(ours(input_ids, labels=input_ids, num_items_in_batch=count).loss, expected)


def test_loss_leaves_out_labels_of_minus_100() -> None:
    logits = torch.randn(1, 4, 9)
    labels = torch.tensor([[5, -100, 3, -100]])
    assert torch.equal(causal_lm_loss(logits, labels), F.cross_entropy(logits[0, 1:2], labels[0, 2:3]))


@pytest.mark.parametrize("article_attention", [False, True])
@pytest.mark.parametrize("precision", [{}, {"residual_dtype": "float64", "compute_dtype": "bfloat16"}])
def test_stages_run_by_hand_are_the_forward(article_attention: bool, precision: dict[str, str]) -> None:
    _, ours = twins(llama_config(), article_attention=article_attention, **precision)
    input_ids = torch.randint(0, 61, (2, 20))
    article_ids = torch.tensor([[1] * 8 + [2] * 12, [1] * 15 + [0] * 5]) if article_attention else None
    stages = ours.stages()
    cos, sin = ours.rotary_tables(20)
    articles = None if article_ids is None else article_spans(article_ids)
    hidden_states = ours.get_submodule(stages.embed)(input_ids)
    for block in stages.blocks:
        hidden_states = ours.get_submodule(block)(hidden_states, cos, sin, articles)
    logits = ours.get_submodule(stages.head)(ours.get_submodule(stages.norm)(hidden_states))
    assert torch.equal(logits, ours(input_ids, article_ids=article_ids).logits)


def test_article_attention_equals_one_forward_per_article() -> None:
    _, ours = twins(llama_config(), torch.float64, article_attention=True)
    lengths = [[5, 9, 6], [1, 14, 5]]
    input_ids = torch.randint(0, 61, (2, 20))
    article_ids = torch.tensor([[i for i, n in enumerate(row, 1) for _ in range(n)] for row in lengths])
    together = ours(input_ids, article_ids=article_ids).logits
    for row, parts in enumerate(lengths):
        start = 0
        for length in parts:
            article = slice(start, start + length)
            positions = torch.arange(start, start + length)[None]  # they do not restart in an article
            alone = ours(input_ids[row : row + 1, article], position_ids=positions, use_cache=False).logits
            assert relative_error(together[row : row + 1, article], alone) < 1e-12
            start += length


def test_training_with_article_attention_demands_the_articles() -> None:
    _, ours = twins(llama_config(), article_attention=True)
    with pytest.raises(ValueError, match="needs article_ids"):
        ours.train()(torch.tensor([[1, 2]]))


def test_equal_blocks_are_equal_but_for_their_weights() -> None:
    """A program over regions captures one block and runs it for all: a block must not know which one it is."""
    first, second = twins(llama_config())[1].model.layers

    def plain(module: torch.nn.Module) -> dict[str, dict[str, object]]:
        hidden = {"_parameters", "_buffers", "_modules"}
        return {n: {k: v for k, v in vars(m).items() if k not in hidden} for n, m in module.named_modules()}

    assert plain(first) == plain(second)


def test_precision_dtypes_reach_every_part() -> None:
    _, ours = twins(
        llama_config(), compute_dtype="bfloat16", residual_dtype="float64", norm_dtype="float64", logits_dtype="float64"
    )
    seen: dict[str, torch.dtype] = {}

    def note(name: str, module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        seen[name] = output.dtype

    for name, module in ours.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) or name.endswith(("norm", "layers.0")):
            module.register_forward_hook(functools.partial(note, name))
    input_ids = torch.tensor([[1, 2, 3]])
    loss = ours(input_ids, labels=input_ids).loss
    residual = {"model.embed_tokens", "model.layers.0"}
    assert {name for name, dtype in seen.items() if dtype == torch.float64} == residual
    assert {dtype for name, dtype in seen.items() if name not in residual} == {torch.bfloat16}
    assert loss.dtype == torch.float64
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())


def test_auto_precision_follows_the_parameters_when_they_change() -> None:
    _, ours = twins(llama_config())
    input_ids = torch.tensor([[1, 2, 3]])
    output = ours.bfloat16()(input_ids, labels=input_ids)
    assert (output.logits.dtype, output.loss.dtype) == (torch.bfloat16, torch.float32)
    assert ours.precision.norms == "float32"


def test_auto_classes_know_the_zoo() -> None:
    config = ConfigurationTransformer().transform(llama_config())
    assert type(AutoModelForCausalLM.from_config(config)) is ZooLlamaForCausalLM
    assert type(AutoConfig.for_model("zoo_llama")) is ZooLlamaConfig


def test_hidden_states_equal_transformers() -> None:
    theirs, ours = twins(llama_config())
    input_ids = torch.randint(0, 61, (1, 9))
    expected = theirs(input_ids, output_hidden_states=True).hidden_states
    actual = ours(input_ids, output_hidden_states=True).hidden_states
    assert len(actual) == len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_a_tuple_comes_back_when_asked_for() -> None:
    _, ours = twins(llama_config())
    output = ours(torch.tensor([[1, 2]]), return_dict=False)
    assert isinstance(output, tuple)
    assert output[0].shape == (1, 2, 61)


def test_activation_checkpointing_runs_blocks_twice_and_gives_the_same_gradients() -> None:
    _, ours = twins(llama_config())
    twin = copy.deepcopy(ours)
    # The name before transformers 5.18 is deprecated after it.
    enable = getattr(twin, "activation_checkpointing_enable", None) or twin.gradient_checkpointing_enable
    enable()
    calls: list[str] = []
    twin.model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append("norm"))
    input_ids = torch.randint(0, 61, (2, 12))
    for model in (ours.train(), twin.train()):
        model(input_ids, labels=input_ids).loss.backward()
    assert len(calls) == 2
    for expected, actual in zip(ours.parameters(), twin.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)


def test_another_attention_implementation_is_refused() -> None:
    config = ConfigurationTransformer().transform(llama_config())
    with pytest.raises(ValueError, match="leave the argument out"):
        ZooLlamaForCausalLM._from_config(config, attn_implementation="eager")


def test_resized_embeddings_keep_the_old_tokens() -> None:
    _, ours = twins(llama_config())
    input_ids = torch.randint(0, 61, (1, 5))
    before = ours(input_ids).logits
    ours.resize_token_embeddings(70, mean_resizing=False)
    assert torch.equal(ours(input_ids).logits[..., :61], before)
    assert ours.config.vocab_size == 70
