"""A region as a module: the same numbers without writes in place, in every dialect, under its verifier."""

import re
import struct

import pytest
import torch

from compiled.mlir.importing import DIALECTS, import_region, pure_graph, to_bytecode
from compiled.mlir.isolation import Limits
from compiled.mlir.lowering import lower_regions
from compiled.mlir.modules import mutated_positions
from tests.compiled.mlir.conftest import LOWRANK, OPTICAL, Capture, random_inputs

pytest.importorskip("torch_mlir", reason="the extra [mlir] is not installed", exc_type=ImportError)

CASES: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "adamw, tied": ((), {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    "sgdm, article attention": (("optimizer=sgdm", "model.article_attention=true"), {"num_hidden_layers": 1}),
    "optical": ((OPTICAL, "optimizer=sgdm"), {"num_hidden_layers": 1}),
    "low rank, bfloat16": ((LOWRANK, "model.dtype=bfloat16", "compile.head_chunks=2"), {"num_hidden_layers": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_graph_without_writes_in_place_computes_the_same(capture: Capture, case: str) -> None:
    """Every region of the step: outputs, then the new value of what it writes, which itself stays as it is."""
    settings, fields = CASES[case]
    for region in capture(*settings, **fields).regions.values():
        written = mutated_positions(region.spec)
        pure = pure_graph(region.graph, region.inputs, written)
        given, mine = random_inputs(region.spec), random_inputs(region.spec)
        expected = [*region.graph(*given), *(given[index] for index in written)]
        results = pure(*mine)
        assert len(results) == len(expected)
        for result, value in zip(results, expected, strict=True):
            assert result.dtype == value.dtype
            torch.testing.assert_close(result, value, equal_nan=True)
        assert not any(node.target == torch.ops.aten.copy_.default for node in pure.graph.nodes)
        untouched = zip(mine, random_inputs(region.spec), strict=True)
        assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in untouched)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("case", CASES)
def test_every_region_lowers_to_every_dialect(capture: Capture, case: str, dialect: str) -> None:
    """`import_region` runs MLIR's verifier; nothing of another dialect than the one asked for is left."""
    settings, fields = CASES[case]
    step = capture(*settings, **fields)
    modules = lower_regions(step.regions, dialect, Limits(120, 8), at_a_time=2)  # type: ignore[arg-type]
    assert modules.keys() == step.regions.keys()
    for name, outcome in modules.items():
        text = outcome.value.decode()
        region = step.regions[name].spec
        (arguments,) = re.findall(rf"func\.func @{name}\((.*?)\) -> ", text)
        assert len(re.findall(r"%arg\d+:", arguments)) == len(region.inputs)
        left = {found.split(".")[0] for found in re.findall(r"= \"?(\w+\.\w+)", text)}
        assert ("torch" in left) == (dialect == "torch")
        assert dialect not in ("stablehlo", "tosa") or dialect in text or len(text) < 600


def test_bytecode_reads_back_as_the_same_module(capture: Capture) -> None:
    from torch_mlir.ir import Context, Module

    region = capture().regions["head_evaluate"]
    text = import_region(region.graph, region.inputs, "linalg", name="head_evaluate")
    bytecode = to_bytecode(text)
    assert bytecode[:4] == b"ML\xefR"
    assert len(bytecode) < len(text)
    with Context():
        assert str(Module.parse(bytecode)) == text.decode()


def test_a_table_that_is_baked_in_comes_along() -> None:
    """A backend may hold constants; weights never are any."""
    table = torch.tensor([3.0, 5.0, 7.0])
    text = import_region(lambda x: (x * table,), [torch.zeros(2, 3)], "linalg").decode()
    assert struct.pack("<3f", 3, 5, 7).hex().upper() in text
