"""What is not done again changes nothing in what Inductor makes."""

import contextlib
import re
from pathlib import Path
from unittest import mock

import pytest
import sympy
import torch
from torch import Tensor
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch.utils._sympy.value_ranges import ValueRanges

from compiled import lowering
from compiled.lowering_speed import without_repetition


def of_many_types(x: Tensor, number: Tensor) -> tuple[Tensor, ...]:
    word = torch.arange(x.shape[-1], dtype=torch.int32) * 77 ^ number.to(torch.int32)
    return (torch.where(word >> 3 & 1 == 0, x, x.amax(-1, keepdim=True)), (word.to(x.dtype) * x).mean(-1))


def sources(folder: Path) -> list[str]:
    """The C++ that is written for `of_many_types`, without the names of its files."""
    with lowering.fake_mode():
        inputs = [torch.empty(3, 5, 24), torch.empty((), dtype=torch.int64)]
    lowering.lower(lowering.trace(of_many_types, inputs), inputs, "cpu", folder / "region", folder / "debug")
    return [re.sub(r"/\S+|c[a-z2-7]{50,}", "", path.read_text()) for path in folder.rglob("output_code.cpp")]


def test_the_same_code_is_written(tmp_path: Path) -> None:
    with mock.patch.object(lowering, "without_repetition", contextlib.nullcontext):
        (tmp_path / "plain").mkdir()
        plain = sources(tmp_path / "plain")
    (tmp_path / "quick").mkdir()
    assert plain
    assert sources(tmp_path / "quick") == plain


def test_rules_are_filled_in_once() -> None:
    fill = DtypePropagationOpsHandler.__init__
    with mock.patch.object(DtypePropagationOpsHandler, "__init__", autospec=True, side_effect=fill) as filling:
        with without_repetition():
            handlers = [DtypePropagationOpsHandler() for _ in range(3)]
            assert handlers[0].eq(1, 2.0) == torch.bool
        assert filling.call_count == 1
        DtypePropagationOpsHandler()
        assert filling.call_count == 2  # outside all is as PyTorch has it
    assert DtypePropagationOpsHandler.__init__ is fill


@pytest.mark.parametrize(
    "one", [ValueRanges(0, 7), ValueRanges(sympy.Float(0.5), sympy.oo), ValueRanges.unknown_bool()]
)
def test_ranges_meet_as_they_did(one: ValueRanges) -> None:
    others = [one, ValueRanges(one.lower, one.upper)]
    others += [] if one.is_bool else [ValueRanges(one.lower, one.lower), ValueRanges.unknown()]
    expected = [one & other for other in others]
    with without_repetition():
        assert [one & other for other in others] == expected
        assert (one & ValueRanges(one.lower, one.upper)) is one
