"""Which row of blocks is compressed, and which of several patterns gives a layer its rank."""

import pytest
import torch
from torch import nn

from backends.errors import UserError
from modelzoo.compression import compress_model
from modelzoo.compression.allocation import LayerShape
from modelzoo.compression.choosing import blocks_of, ranks_by_layer

LAYERS = [f"layers.{index}.{part}" for index in range(2) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.proj")]
SHAPES = dict.fromkeys(LAYERS, LayerShape(32, 32))


def test_globs_and_ends_name_layers() -> None:
    assert set(ranks_by_layer(SHAPES, {"*.mlp.*": 4, "q_proj": 5}).items()) == {
        (name, 4 if ".mlp." in name else 5) for name in LAYERS
    }


@pytest.mark.parametrize("order", [1, -1])
def test_the_most_specific_name_gives_the_rank_in_whatever_order_they_come(order: int) -> None:
    ranks = {"layers.0.mlp.up_proj": 3, "mlp.up_proj": 4, "up_proj": 5, "*.mlp.*_proj": 6, "*": 7}
    found = ranks_by_layer(SHAPES, dict(list(ranks.items())[::order]))
    assert [found[name] for name in LAYERS] == [7, 3, 7, 7, 4, 7]
    del ranks["mlp.up_proj"]
    assert ranks_by_layer(SHAPES, ranks)["layers.1.mlp.up_proj"] == 5
    del ranks["up_proj"]
    assert ranks_by_layer(SHAPES, ranks)["layers.1.mlp.up_proj"] == 6


class Block(nn.Module):
    """x + A x, or the mean of its experts' A x."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + sum(expert(x) for expert in self.experts) / len(self.experts)


class Towers(nn.Module):
    """Two rows of blocks, and a head that is no block."""

    def __init__(self, experts: int = 1) -> None:
        super().__init__()
        self.vision, self.text = (nn.ModuleList(Block(experts) for _ in range(number)) for number in (3, 2))
        self.pooler = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
        for block in () if image is None else self.vision:
            image = block(image)
        for block in self.text:
            x = block(x)
        return self.pooler(x)


X = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))


def test_the_longest_row_that_was_named_is_compressed() -> None:
    both = [{"x": X, "image": X}]
    assert {each.name.split(".")[0] for each in compress_model(Towers(), both, keep=0.5)} == {"vision"}
    for named in ({"keep": 0.5, "match": "text.*"}, {"ranks": {"text.*": 4}}):
        for data in (both, [{"x": X}]):
            reports = compress_model(Towers(), data, **named)
            assert [each.name for each in reports] == ["text.0.experts.0", "text.1.experts.0"]


def test_experts_are_no_row_of_blocks() -> None:
    assert list(blocks_of(Towers(experts=8))) == ["vision.0", "vision.1", "vision.2"]
    assert list(blocks_of(nn.ModuleList([Towers()]))) == ["0.vision.0", "0.vision.1", "0.vision.2"]  # a wrapper is none


def test_layers_of_another_row_or_of_none_are_refused() -> None:
    both = [{"x": X, "image": X}]
    with pytest.raises(UserError, match=r"'text\.0\.experts\.0' is not in 'vision', the longest row"):
        compress_model(Towers(), both, keep=0.5, match="experts.0")
    with pytest.raises(UserError, match="'pooler' is in none of the model's blocks"):
        compress_model(Towers(), both, keep=0.5, match=["pooler", "text.*"])
    with pytest.raises(UserError, match=r"Sequential has no nn\.ModuleList"):
        compress_model(nn.Sequential(nn.Linear(4, 4)), [{"input": X}], keep=0.5)
