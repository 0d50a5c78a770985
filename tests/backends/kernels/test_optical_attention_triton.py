"""The kernels of triton_attention_forward.py and triton_attention_backward.py without a GPU."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

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
