import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from backends.kernels import fp8_turned
from backends.kernels.fp8 import E4M3, E5M2, power_of_two
from tests.backends.kernels import fp8_reference as reference

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, E4M3])
def test_a_matrix_is_scaled_rounded_once_and_turned(given, by_row):
    x = (torch.randn(48, 32, generator=torch.Generator().manual_seed(0)) * 16).to(given)
    exponent = (
        torch.arange(48, dtype=torch.int32)[:, None] % 9 - 8 if by_row else torch.full((1, 1), -3, dtype=torch.int32)
    )
    found = fp8_turned.turned(x, power_of_two(exponent), E4M3)
    assert (found.shape, found.dtype) == ((32, 48), E4M3)
    assert found.is_contiguous()
    assert torch.equal(found.double().t(), reference.E4M3.nearest(x.double() * 2.0 ** exponent.double()))


@needs_triton
def test_the_interpreted_kernel_computes_what_plain_torch_does():
    run = subprocess.run(
        [sys.executable, "-m", "tests.backends.kernels.interpreted_turned"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert [json.loads(line)[1] for line in run.stdout.splitlines()] == [True] * 4


@needs_triton
@pytest.mark.parametrize(("given", "wanted"), [("fp8e5", "fp8e5"), ("bf16", "fp8e4nv"), ("fp32", "fp8e4nv")])
def test_the_kernel_compiles_for_hopper_and_moves_16_bytes_at_a_time(given, wanted):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fp8_turned.register()
    signature = {"x": f"*{given}", "factor": "*fp32", "out": f"*{wanted}", "rows": "i32", "columns": "i32"}
    constants = {"BY_ROW": True, "BLOCK_ROWS": fp8_turned.ROWS, "BLOCK_COLUMNS": fp8_turned.COLUMNS}
    source = ASTSource(
        fn=fp8_turned.turned_kernel,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(argument,): [["tt.divisibility", 16]] for argument in range(5)},
    )
    target = GPUTarget("cuda", 90, 32)
    code = triton.compile(source, target=target, options={"num_warps": fp8_turned.WARPS}).asm["ptx"]
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code
    assert "st.global.b8" not in code


def test_both_formats_are_turned_without_a_change_under_a_factor_of_one():
    for dtype in (E4M3, E5M2):
        x = torch.randn(16, 48).to(dtype)
        found = fp8_turned.turned(x, torch.ones(1, 1), dtype)
        assert torch.equal(found.double(), x.double().t())
