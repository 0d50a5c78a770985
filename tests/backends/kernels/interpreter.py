"""Runs a program of this folder whose kernels go through Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton for its interpreter: pip install triton==3.7.1"
)


def interpreted(program: str) -> list[Any]:
    """The JSON lines that `program` prints. Triton reads its variable once, so that a process of its own is needed."""
    if torch.__version__ < "2.12":
        pytest.skip("torch 2.11 takes no interpreted kernel into an operator")
    run = subprocess.run(
        [sys.executable, "-m", f"tests.backends.kernels.{program}"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def hopper_code(kernel: Any, constants: dict[str, Any], kinds: dict[str, str], warps: int, **options: Any) -> str:
    """PTX of a Triton kernel for a GPU that need not be there; arguments without a kind are float32 tensors."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in names}
    aligned = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(names) if name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **options})
    return str(code.asm["ptx"])
