"""The parts of the zoo Llama on their own: each against its formula, and the block as something to capture."""

import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from backends.articles import article_spans
from modelzoo import build_meta
from modelzoo.configuration_transformer import ConfigurationTransformer
from modelzoo.llama_block import ZooLlamaDecoderLayer, ZooLlamaEmbedding, ZooLlamaRMSNorm
from modelzoo.llama_config import ZooLlamaConfig
from modelzoo.rotary import rotary_tables
from tests.modelzoo.llamas import llama_config


def zoo_config(**arguments: object) -> ZooLlamaConfig:
    return ConfigurationTransformer().transform(llama_config(pad_token_id=3), **arguments)


def test_norm_has_unit_root_mean_square_times_weight() -> None:
    norm = ZooLlamaRMSNorm(zoo_config()).double()
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(2, 5, 32, dtype=torch.float64) * 7
    expected = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, rtol=1e-14, atol=1e-14)


def test_norm_of_bfloat16_is_rounded_once() -> None:
    norm = ZooLlamaRMSNorm(zoo_config()).bfloat16()
    x = torch.randn(2, 5, 32).bfloat16()
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    torch.testing.assert_close(norm(x), expected.bfloat16(), rtol=2**-8, atol=0)
    assert (norm(x) == expected.bfloat16()).float().mean() > 0.99


def test_padding_token_learns_nothing() -> None:
    embedding = ZooLlamaEmbedding(zoo_config(residual_dtype="float64"))
    hidden_states = embedding(torch.tensor([[3, 4, 4]]))
    assert hidden_states.dtype == torch.float64
    hidden_states.sum().backward()
    assert embedding.weight.grad[[3, 4]].tolist() == [[0.0] * 32, [2.0] * 32]


def test_block_sees_no_later_token() -> None:
    block, tables = ZooLlamaDecoderLayer(zoo_config()), rotary_tables(zoo_config(), torch.arange(6), torch.float32)
    x = torch.randn(1, 6, 32, requires_grad=True)
    block(x, *tables)[0, 2].sum().backward()
    assert (x.grad[0] != 0).any(-1).tolist() == [True, True, True, False, False, False]


def test_block_obeys_a_mask() -> None:
    block, tables = ZooLlamaDecoderLayer(zoo_config()), rotary_tables(zoo_config(), torch.arange(4), torch.float32)
    x = torch.randn(1, 4, 32, requires_grad=True)
    mask = torch.eye(4, dtype=torch.bool)[None, None]
    mask[..., 3, 1] = True
    block(x, *tables, mask=mask)[0, 3].sum().backward()
    assert (x.grad[0] != 0).any(-1).tolist() == [False, True, False, True]


def test_block_runs_without_memory() -> None:
    block = build_meta(zoo_config(), torch.bfloat16).model.layers[1]
    table = torch.empty(6, 8, device="meta", dtype=torch.bfloat16)
    y = block(torch.empty(2, 6, 32, device="meta", dtype=torch.bfloat16), table, table)
    assert (y.shape, y.dtype, y.device.type) == ((2, 6, 32), torch.bfloat16, "meta")


@pytest.mark.parametrize("packed", [False, True])
def test_block_is_captured_as_one_pure_graph(packed: bool) -> None:
    block = ZooLlamaDecoderLayer(zoo_config())
    parameters = dict(block.named_parameters())
    articles = (article_spans(torch.tensor([[1, 1, 2, 2, 2, 0], [1] * 6])),) if packed else ()
    inputs = (torch.randn(2, 6, 32), *rotary_tables(zoo_config(), torch.arange(6), torch.float32))

    def run(parameters: dict[str, torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(block, parameters, inputs)

    arguments = (parameters, *inputs, *articles)
    graph = make_fx(run, tracing_mode="fake")(*arguments)
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]  # no constant baked in
    assert torch.equal(graph(*arguments), block(*inputs, *articles))
