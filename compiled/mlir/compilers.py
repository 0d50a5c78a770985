"""What a compiler of MLIR modules is to this project: two methods, in a class that may live anywhere."""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from backends.errors import UserError
from backends.outside_class import outside_class

BUILT_IN = {"iree": "compiled.mlir.iree_cpu:IreeCompiler"}

# Dialects of which IREE takes the text that torch-mlir prints; its parser refuses that of TOSA.
_IREE_TAKES = ("linalg", "stablehlo", "torch")

# A loaded module: its arguments, contiguous tensors on the CPU that it must not write, to results that
# `torch.from_dlpack` takes (torch tensors are).
Run = Callable[[Sequence[Tensor]], Sequence[Any]]


class CompileError(Exception):
    """A compiler refused a module; the text says why, in the compiler's words."""


class Compiler(ABC):
    """MLIR module → binary, in the process that makes an artifact; binary → function, in those that train from it.

    Made without arguments. A module has one public function, whose arguments and results the artifact's manifest names.
    """

    @property
    def version(self) -> str:
        """Equal for compilers whose binaries are alike; of the class's source file, unless it says better."""
        return hashlib.sha256(Path(inspect.getfile(type(self))).read_bytes()).hexdigest()[:12]

    @abstractmethod
    def compile(self, module: bytes) -> bytes:
        """The binary of a module (text or bytecode). Raises `CompileError`."""

    @abstractmethod
    def load(self, binary: bytes) -> Run:
        """What `compile` made as a function, ready to be called many times from one thread."""


def compiler_name(asked: str, dialect: str) -> str | None:
    """The compiler that `compile.mlir.compiler` means, as `find_compiler` takes it; None: modules and no binaries."""
    if asked == "auto":
        return "iree" if dialect in _IREE_TAKES else None
    return None if asked == "none" else asked


def describe_target(dialect: str, asked: str) -> dict[str, str]:
    """The field `target` of a step's spec: the dialect of its modules, and which compiler makes binaries of them."""
    name = compiler_name(asked, dialect)
    made_by = {} if name is None else {"compiler": name, "compiler_version": find_compiler(name).version}
    return {"kind": "mlir", "dialect": dialect, **made_by}


def find_compiler(name: str) -> Compiler:
    """The compiler called `name`: "iree" or `package.module:Class`; `UserError` when there is none."""
    if ":" not in name and name not in BUILT_IN:
        raise UserError(
            f"Unknown MLIR compiler '{name}'. Expected {', '.join(BUILT_IN)} or package.module:Class, a subclass of "
            f"{Compiler.__module__}.{Compiler.__name__}."
        )
    found = outside_class(BUILT_IN.get(name, name), Compiler, "MLIR compiler")  # type: ignore[type-abstract]
    absent = sorted(getattr(found, "__abstractmethods__", ()))
    if absent:
        raise UserError(f"MLIR compiler '{name}' lacks {' and '.join(absent)}. Write both: see docs/mlir.md.")
    return found()
