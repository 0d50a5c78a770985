"""Compilers that need nothing installed: a module is the name of a Python function of this file."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from compiled.mlir.compilers import CompileError, Compiler, Run


class NamedFunction(Compiler):
    """Refuses `refused`; the binary is the module."""

    def compile(self, module: bytes) -> bytes:
        if module == b"refused":
            raise CompileError("such a thing is not done")
        if module == b"text":
            return "text"  # type: ignore[return-value]
        return module

    def load(self, binary: bytes) -> Run:
        function: Run = globals()[binary.decode()]
        return function


class Unfinished(Compiler):
    def compile(self, module: bytes) -> bytes:
        return module


def doubling(tensors: Sequence[Tensor]) -> Sequence[Any]:
    """x, a → 2 x, a, x + a, a: the second result and the last are the argument itself; one comes as an array."""
    x, a = tensors
    assert x.is_contiguous()
    return [(x + x).numpy(), a, x + a, a]


def one_short(tensors: Sequence[Tensor]) -> Sequence[Any]:
    return doubling(tensors)[:3]


def wider(tensors: Sequence[Tensor]) -> Sequence[Any]:
    return [*doubling(tensors)[:2], (tensors[0] + tensors[1]).double(), tensors[1]]


def flatter(tensors: Sequence[Tensor]) -> Sequence[Any]:
    return [numpy.zeros(12, numpy.float32), *doubling(tensors)[1:]]


def twice_the_same(tensors: Sequence[Tensor]) -> Sequence[Any]:
    y = torch.zeros(3, 4)
    return [y, torch.tensor(1.0), y, torch.tensor(2.0)]
