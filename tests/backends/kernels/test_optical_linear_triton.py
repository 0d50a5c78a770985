"""The kernels of triton_linear.py without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from backends.kernels import optical_linear
from backends.kernels import optical_linear_cuda as kernels
from backends.kernels.optical_product import Converters
from compiled import flops, lowering

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton for its interpreter: pip install triton==3.7.1"
)


def test_interpreted_kernels_compute_what_plain_torch_does() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.backends.kernels.interpreted_linear"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 14
    # The interpreter's bfloat16 is cut off: a unit of its last place is up to 0.8 levels here. Where the 1e-8 that is
    # added to a width counts, a value above the range is dithered by the twin and is the top level in the kernel.
    allowed = {"bfloat16": 0.8, "narrow ranges": 1.0}
    for case, errors in lines:
        assert errors["largest error in levels"] <= allowed.get(case, 0.01), (case, errors)
        assert errors["ranges"] == 0.0, (case, errors)
        assert errors["other elements are no numbers"] == 0, (case, errors)
        assert errors.get("error against float64 as a part of its bound", 0.0) <= 1.0, (case, errors)


def test_a_captured_linear_is_one_operator_that_counts_the_products_work(monkeypatch: Any) -> None:
    monkeypatch.setattr(optical_linear, "_has_kernels", lambda *_: True)

    def compute(x: torch.Tensor, w: torch.Tensor, step: torch.Tensor, *ranges: torch.Tensor) -> tuple[Any, ...]:
        converters = Converters(256, 256, 0.02, None, None, 0)
        y, seen = optical_linear.optical_linear(x, w, None, ranges, step, step, converters, observe=True)
        return (y, *seen)

    from torch._functorch import config

    operands = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(5, 8, dtype=torch.bfloat16)
    ranges = [torch.tensor(0.0) for _ in range(6)]
    with config.patch(decompose_custom_triton_ops=False), torch.no_grad():
        graph = lowering.trace(compute, [*operands, torch.tensor(0), *ranges])
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.substrate.optical_linear_forward.default))
    assert not graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    assert flops.count_flops(graph) == 2 * (2 * 3) * 8 * 5


POINTERS = {"x": "bf16", "bias": "bf16", "light": "fp16", "sums": "fp16", "number": "i64", "first_row": "i64"}
CONSTANTS = {"PART": 0, "LEVELS": 256, "LUT_MIN": 0.02, "BLOCK": kernels.BLOCK, "OBSERVE": True, "COLUMNS": 5632}
CONSTANTS |= {"FIRST_WORD": 2**32 - 3, "SECOND_WORD": 5, "BFLOAT16": True}


@pytest.mark.parametrize("name", ["operand_kernel", "result_kernel"])
@pytest.mark.parametrize("even", [True, False])
def test_kernels_compile_for_hopper_to_wide_loads_and_no_exchange(name: str, even: bool) -> None:
    """16 bytes a thread at a time, each in the thread that has it: a pass is then as fast as its bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels.register()
    kernel = getattr(kernels, name)
    constants = CONSTANTS | {"EVEN": even, "BIAS": not even}
    signature, given, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name], given[parameter.name] = "constexpr", constants[parameter.name]
            continue
        number = parameter.name in ("count", "row_size")
        signature[parameter.name] = "i32" if number else f"*{POINTERS.get(parameter.name, 'fp32')}"
        attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=attributes)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.WARPS})
    tensors = 1 if even or name == "operand_kernel" else 2  # with a bias, its columns too
    assert code.asm["ptx"].count("ld.global.v4") == tensors * kernels.BLOCK // (32 * kernels.WARPS * 8)
    assert code.asm["ptx"].count("st.global.v4") == kernels.BLOCK // (32 * kernels.WARPS * 8)
    assert "convert_layout" not in code.asm["ttgir"]
