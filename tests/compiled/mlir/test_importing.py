"""A region as a module: the same numbers without writes in place, in every dialect, under its verifier."""

import functools
import re
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule

from compiled.mlir.importing import DIALECTS, import_region, module_text, pure_graph, to_bytecode, warm_up
from compiled.mlir.isolation import Limits, run_isolated
from compiled.mlir.modules import mutated_positions
from tests.compiled.mlir.conftest import LOWRANK, OPTICAL, Capture, random_inputs

pytest.importorskip("torch_mlir", reason="the extra [mlir] is not installed", exc_type=ImportError)

CASES: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "adamw, tied": ((), {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    "sgdm, article attention": (("optimizer=sgdm", "model.article_attention=true"), {"num_hidden_layers": 1}),
    "optical": ((OPTICAL, "optimizer=sgdm"), {"num_hidden_layers": 1}),
    "low rank, bfloat16": ((LOWRANK, "model.dtype=bfloat16", "compile.head_chunks=2"), {"num_hidden_layers": 1}),
}


@pytest.fixture(scope="module")
def pure_graphs(capture: Capture) -> Callable[[str], dict[str, GraphModule]]:
    """Case → every region without writes in place, in operators that torch-mlir knows."""

    @functools.cache
    def of_case(case: str) -> dict[str, GraphModule]:
        regions = capture(*CASES[case][0], **CASES[case][1]).regions
        return {
            name: pure_graph(region.graph, region.inputs, mutated_positions(region.spec))
            for name, region in regions.items()
            if name != "block_0_evaluate_forward"  # the operators of the other forward
        }

    return of_case


@pytest.mark.parametrize("case", CASES)
def test_the_graph_without_writes_in_place_computes_the_same(capture: Capture, pure_graphs: Any, case: str) -> None:
    """Every region of the step: outputs, then the new value of what it writes, which itself stays as it is."""
    settings, fields = CASES[case]
    regions = capture(*settings, **fields).regions
    for name, pure in pure_graphs(case).items():
        region = regions[name]
        given, mine = random_inputs(region.spec), random_inputs(region.spec)
        expected = [*region.graph(*given), *(given[index] for index in mutated_positions(region.spec))]
        results = pure(*mine)
        assert len(results) == len(expected)
        for result, value in zip(results, expected, strict=True):
            assert result.dtype == value.dtype
            torch.testing.assert_close(result, value, equal_nan=True)
        assert not any(node.target == torch.ops.aten.copy_.default for node in pure.graph.nodes)
        untouched = zip(mine, random_inputs(region.spec), strict=True)
        assert all(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in untouched)


@pytest.mark.parametrize("case", CASES)
def test_every_region_lowers_to_every_dialect(capture: Capture, pure_graphs: Any, case: str) -> None:
    """Under MLIR's verifier, with the arguments of the region, and nothing left of another dialect than asked for."""
    graphs = pure_graphs(case)
    warm_up()

    def lower() -> dict[tuple[str, str], str]:
        return {
            (name, dialect): module_text(pure, dialect, name).decode()
            for name, pure in graphs.items()
            for dialect in DIALECTS
        }

    outcome = run_isolated({case: lower}, Limits(300, 8))[case]
    assert outcome.problem is None, outcome.output[-2000:]
    assert len(outcome.value) == len(DIALECTS) * len(graphs)
    regions = capture(*CASES[case][0], **CASES[case][1]).regions
    for (name, dialect), text in outcome.value.items():
        (arguments,) = re.findall(rf"func\.func @{name}\((.*?)\) -> ", text)
        assert len(re.findall(r"%arg\d+:", arguments)) == len(regions[name].spec.inputs)
        used = {found.split(".")[0] for found in re.findall(r"= \"?(\w+\.\w+)", text)}
        assert ("torch" in used) == (dialect == "torch")
        assert dialect in used


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
