"""The kernels of triton_attention_forward.py and triton_attention_backward.py without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from backends.kernels import optical_attention_cuda as kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton for its interpreter: pip install triton==3.7.1"
)


@pytest.mark.slow
def test_interpreted_kernels_compute_what_plain_torch_does():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.backends.kernels.interpreted_attention"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == 11
    for case, levels, errors in lines:
        # a sum in another order may fall on the other side of a rounding, rarely
        assert errors["largest error in levels"] <= 1.001, (case, levels, errors)
        assert errors["share of errors above 0.01 levels"] <= 0.005, (case, levels, errors)
        assert errors["ranges"] < 1e-4, (case, levels, errors)
        assert errors["gradients"] < 1e-3, (case, levels, errors)


KERNELS = ("attention_forward_kernel", "attention_grad_query_kernel", "attention_grad_key_kernel")
POINTERS = {"q": "fp16", "k": "fp16", "v": "fp16", "ranges": "fp32", "keys": "i32", "first_row": "i64", "mask": "i1"}
POINTERS |= {"spans": "i32", "logsums": "fp32", "deltas": "fp32", "observed": "fp32"}  # the others hold bfloat16
CONSTANTS = {"SCALE": 0.125, "HEADS": 8, "GROUPS": 2, "D": 64, "DV": 64, "INPUT_LEVELS": 256, "OUTPUT_LEVELS": 256}
CONSTANTS |= {"BLOCK_M": 64, "BLOCK_N": 64, "SAVE": True, "OBSERVE": True}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", ["numbers", "constants"])
def test_kernels_compile_for_hopper_with_sizes_given_either_way(name: str, masked: bool, sizes: str) -> None:
    """Inductor gives sizes and strides as constants when it asks which tensors a kernel writes, later as numbers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels.register()
    kernel = getattr(kernels, name)
    constants = CONSTANTS | {"MASKED": masked, "CAUSAL": not masked}
    signature, given = {}, {}
    for parameter in kernel.params:
        wanted = parameter.name.startswith("stride_") or parameter.name in ("num_rows", "num_cols")
        if parameter.name in constants or (wanted and (sizes == "constants" or parameter.is_constexpr)):
            signature[parameter.name], given[parameter.name] = "constexpr", constants.get(parameter.name, 512)
        else:
            signature[parameter.name] = "i32" if wanted else f"*{POINTERS.get(parameter.name, 'bf16')}"
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    assert "wgmma" in code.asm["ptx"]
