"""Triton functions that live in plain Python files: without Triton installed the file imports and nothing runs.

A file of kernels says `tl: Any = None` and writes its kernels as plain functions; `compile_in_place` makes them Triton
functions when the first GPU tensor comes. They stay globals of their file because both Triton and Inductor (which
copies a kernel's source, and all it calls, into a compiled region) look names up there.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any


def compile_in_place(names: dict[str, Any], *functions: Callable[..., Any]) -> None:
    """Replace `functions` in a module's globals `names` by Triton functions, and let it see `triton.language` as `tl`.

    Functions of other files must be compiled before; they are imported here under their own names.
    """
    import triton
    import triton.language

    names["tl"] = triton.language
    for function in functions:
        if isinstance(function, FunctionType):
            names[function.__name__] = triton.jit(function)
