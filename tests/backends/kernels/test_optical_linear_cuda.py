"""On a GPU: the linear's passes against float64, alone and in a captured and compiled region, and what it holds."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backends import load
from backends.layers import BackendLinear
from benchmarks.optical_kernels import calibrate, compiled_step, linear_case, peak_memory

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def layer_and_input(shape: tuple[int, ...], columns: int, dtype: torch.dtype) -> tuple[BackendLinear, Tensor]:
    torch.manual_seed(0)
    layer = BackendLinear(shape[-1], columns, device="cuda", dtype=dtype)
    layer.set_backend(load("optical"))
    x = torch.randn(shape, device="cuda", dtype=dtype)
    calibrate(layer.train(), {"x": x})
    return layer, x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "columns"), [((512, 256), 384), ((3, 77, 333), 129), ((1, 64), 7), ((2, 1, 40), 1)])
def test_results_and_ranges_are_those_of_float64(shape: tuple[int, ...], columns: int, dtype: torch.dtype) -> None:
    layer, x = layer_and_input(shape, columns, dtype)
    reference, level = copy.deepcopy(layer).double(), (layer.out_max - layer.out_min).item() / 255
    y, expected = layer(x), reference(x.double())
    error = (y.double() - expected).abs() / level
    # 16 bits hold 255 levels to half a level; the rest are roundings that fall on the other side
    assert error.mean() < 0.3
    assert error.max() < 2
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name), rtol=2e-3, atol=2e-3)


def test_rows_give_the_same_levels_whichever_worker_computes_them() -> None:
    layer, x = layer_and_input((8, 50, 96), 72, torch.bfloat16)
    other = copy.deepcopy(layer)
    other.first_row.fill_(4)
    level = (layer.out_max - layer.out_min).item() / 255
    whole, part = layer(x), other(x[4:])
    assert ((whole[4:].double() - part.double()).abs() > 0.5 * level).double().mean() < 1e-3


def test_a_compiled_region_gives_what_eager_gives(tmp_path: Path) -> None:
    layer, x = layer_and_input((4, 128, 512), 768, torch.bfloat16)
    step, grad = compiled_step(layer, {"x": x}, tmp_path)
    results = step(grad)
    level = (layer.out_max - layer.out_min).item() / 255
    difference = (results["output"].double() - layer(x).double()).abs()
    assert (difference > 0.5 * level).double().mean() < 1e-3


@pytest.mark.parametrize("shape", [(2048, 1024, 2816), (4096, 384, 1408)])
def test_a_step_needs_the_memory_of_a_dense_one(shape: tuple[int, ...], tmp_path: Path) -> None:
    peaks = []
    for backend in ("dense", "optical"):
        layer, inputs = linear_case(backend, shape)
        calibrate(layer, inputs)
        peaks.append(peak_memory(*compiled_step(layer, inputs, tmp_path)))
    assert peaks[1] <= 1.1 * peaks[0]
