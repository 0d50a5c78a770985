"""The calibration data through the blocks one by one, against whole forwards of models whose blocks differ."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from backends.errors import UserError
from modelzoo.compression import compress_model
from modelzoo.compression.block_calls import block_calls
from modelzoo.compression.choosing import blocks_of
from modelzoo.compression.streaming import BlockInputs
from tests.modelzoo.compression.test_compressing import pair
from tests.modelzoo.llamas import llama_config

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
IDS = torch.randint(3, 61, (2, 16), generator=torch.Generator().manual_seed(5))
T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4}


def qwen2() -> nn.Module:
    sliding = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, **sliding))


def gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]  # with a rope of its own each
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=kinds)
    return transformers.Gemma3ForCausalLM(config)


def t5_encoder() -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(**T5))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(llama_config())


def zoo_llama() -> nn.Module:
    return pair(norm_dtype="float32")[1]


@torch.no_grad()
def made(make: Callable[[], nn.Module]) -> nn.Module:
    """The model, with weights large enough that a wrong mask shows."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    return model


def last_output(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the last block gives in a forward of the whole model."""
    *_, last = blocks_of(model).values()
    seen = []
    handle = last.register_forward_hook(lambda block, inputs, y: seen.append(y if torch.is_tensor(y) else y[0]))
    model(**batch)
    handle.remove()
    return seen[0]


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, zoo_llama, qwen2, gemma3, t5_encoder])
def test_block_after_block_gives_what_the_whole_model_gives(make: Callable[[], nn.Module]) -> None:
    model = made(make)
    blocks = blocks_of(model)
    stream = BlockInputs(model, blocks, [{"input_ids": IDS}])
    for path, block in blocks.items():
        list(stream.outputs(path, block))  # as often as anyone likes: nothing is kept of it
        stream.advance(path, block)
    torch.testing.assert_close(stream.hidden_states[0], last_output(model, {"input_ids": IDS}))


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, zoo_llama])
def test_what_blocks_share_is_held_once(make: Callable[[], nn.Module]) -> None:
    """One mask and one rotary table a batch, however many blocks there are."""
    model = made(make)
    found = block_calls(model, blocks_of(model), {"input_ids": IDS, "use_cache": False})
    assert found is not None
    first, *others = found[1].values()
    given = (*first.arguments, *first.named.values())
    assert any(isinstance(each, torch.Tensor | tuple) for each in given)  # cosines and sines
    for other in others:
        assert all(a is b for a, b in zip(given, (*other.arguments, *other.named.values()), strict=True))


def test_a_model_that_would_keep_keys_is_compressed_as_one_that_does_not() -> None:
    found = []
    for extra in ({}, {"use_cache": False}):
        _, model = pair()
        reports = compress_model(model, [{"input_ids": IDS, **extra}], keep=0.5, allocation="spectrum")
        assert model.config.use_cache
        found.append([(each.name, each.rank, each.measured) for each in reports])
    assert found[0] == found[1]


@pytest.mark.parametrize("extra", [{"use_cache": True}, {"past_key_values": transformers.DynamicCache()}])
def test_a_batch_with_a_cache_is_refused(extra: dict[str, object]) -> None:
    _, model = pair()
    with pytest.raises(UserError, match=f"A calibration batch has {next(iter(extra))}"):
        compress_model(model, [{"input_ids": IDS, **extra}], keep=0.5)
    assert model.config.use_cache


def test_a_block_that_is_computed_again_and_again_is_refused() -> None:
    config = transformers.AlbertConfig(**SIZES | {"embedding_size": 16})
    model = made(lambda: transformers.AlbertForMaskedLM(config))
    with pytest.raises(UserError, match=r"Block 'albert\..*' is computed more than once a forward"):
        compress_model(model, [{"input_ids": IDS}], keep=0.5)


class Block(nn.Module):
    """y = x + scale · (A x), all by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, scale: float, x: torch.Tensor) -> torch.Tensor:
        return x + scale * self.linear(x)


class Towers(nn.Module):
    """Two rows of blocks, the longer of which only images reach; `skip`: so many blocks are passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.vision, self.text = (nn.ModuleList(Block() for _ in range(number)) for number in (3, 2))

    def forward(self, x: torch.Tensor, image: torch.Tensor | None = None, skip: int = 0) -> torch.Tensor:
        for block in () if image is None else self.vision[skip:]:
            image = block(x=image, scale=2.0)
        for block in self.text:
            x = block(x=x, scale=2.0)
        return x


def test_hidden_states_may_have_another_name() -> None:
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    reports = compress_model(Towers(), [{"x": x, "image": x}], keep=0.5)
    assert [each.name for each in reports] == [f"vision.{index}.linear" for index in range(3)]


def test_a_row_that_is_not_reached_or_not_all_is_named() -> None:
    x = torch.randn(50, 16)
    with pytest.raises(UserError, match="The row of blocks 'vision' was given nothing"):
        compress_model(Towers(), [{"x": x}], keep=0.5)
    with pytest.raises(UserError, match=r"Block 'vision\.0' was given nothing by a batch"):
        compress_model(Towers(), [{"x": x, "image": x, "skip": 1}], keep=0.5)


def test_a_block_without_hidden_states_is_named() -> None:
    model = Towers()
    model.forward = lambda x: [block(scale=2.0) for block in model.vision]
    with pytest.raises(UserError, match=r"Block 'vision\.0' is called without hidden states"):
        compress_model(model, [{"x": torch.randn(5, 16)}], keep=0.5)
