"""The kernels of inference: interpreted and compiled for a GPU that is absent; on one, and where they have no place."""

import logging
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import StaticCache

from backends.kernels import inference
from backends.kernels.rms_norm import rms_norm
from compiled import lowering
from modelzoo.rotary import rotate
from tests.backends.kernels.interpreter import hopper_code, interpreted, needs_triton
from tests.modelzoo.llamas import llama_config, twins

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@needs_triton
def test_the_interpreted_kernels_give_the_numbers_of_plain_operators():
    lines = interpreted("interpreted_inference")
    assert {kernel for kernel, _, _ in lines} == {"norm", "sum and norm", "rotation", "gate", "model"}
    for kernel, case, differences in lines:
        for share, ulps in differences:
            if kernel == "gate":  # another exponential
                assert share < 0.01, (case, differences)
                assert ulps <= 2, (case, differences)
            elif kernel == "model":
                assert share < 0.1, differences
            else:
                assert ulps == 0, (kernel, case, differences)


@needs_triton
def test_the_kernels_compile_for_hopper():
    norm, turn, gate = inference.triton_inference.compiled_kernels()
    halves = dict.fromkeys(("x", "update", "weight", "total", "normed", "cos", "sin", "turned"), "*bf16")
    ptx = hopper_code(norm, {"WIDTH": 2048, "BLOCK": 2048, "UPDATE": True}, halves | {"epsilon": "fp32"}, 4)
    assert "ld.global.v4" in ptx
    assert "st.global.v4" in ptx
    names = [parameter.name for parameter in turn.params]
    sizes = {name: "i32" for name in names if name not in halves and not name.isupper()}
    constants = {"HALF": 32, "PAIRS": 32, "HEADS": 32}
    assert "fma.rn.bf16" in hopper_code(turn, constants, halves | sizes, 4)
    ptx = hopper_code(turn, constants, halves | sizes, 4, enable_fp_fusion=False)
    assert "st.global.v" in ptx
    assert "fma" not in ptx  # each product is rounded, as plain operators round it
    gated = {"gate": "*bf16", "up": "*bf16", "gated": "*bf16", "count": "i32"}
    assert "ld.global.v4" in hopper_code(gate, {"BLOCK": inference.BLOCK}, gated, 4)


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("a kernel was asked for")

    monkeypatch.setattr(inference, "_kernels", refuse)


def all_operations(x: Tensor) -> list[Any]:
    weight, angles = x[0, 0, 0], x[0, 0]
    return [
        inference.add_rms_norm(x, x, weight, 1e-6, torch.float32, torch.bfloat16),
        inference.rotate(x, angles, angles),
        inference.gated_silu(x, x),
    ]


def test_plain_operators_compute_outside_and_on_a_cpu(no_kernels: None) -> None:
    x = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    assert all_operations(x) == [None, None, None]
    with torch.no_grad(), inference.inference_kernels(x):
        assert all_operations(x) == [None, None, None]


def test_what_is_traced_for_a_gpu_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_work_on", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    with lowering.fake_mode():
        fake = torch.empty(2, 3, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad(), inference.inference_kernels(fake):
        assert inference._device.get() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_numbers_stay_op_for_op(no_kernels: None, dtype: torch.dtype) -> None:
    x = torch.ones(1, 1, 2, 4, dtype=dtype)
    token = inference._device.set(x.device)
    try:
        assert inference.add_rms_norm(x, x, x[0, 0, 0], 1e-6, torch.float32, dtype) is None
        assert inference.rotate(x, x[0, 0], x[0, 0]) is None
        assert inference.gated_silu(x, x) is None
    finally:
        inference._device.reset(token)


def test_kernels_that_do_not_work_are_said_once_and_plain_operators_compute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise RuntimeError("Failed to find C compiler\nand more")

    monkeypatch.setattr(inference, "_kernels", refuse)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    inference._work_on.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not inference._work_on(torch.device("cpu"))
        assert not inference._work_on(torch.device("cpu"))
    inference._work_on.cache_clear()
    (record,) = caplog.records
    assert "text takes longer: Failed to find C compiler" in record.getMessage()
    assert "more" not in record.getMessage()
    assert inference._device.get() is None


class TestOnAGpu:
    pytestmark = needs_cuda

    @pytest.mark.parametrize("residual", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", [(1, 1, 2048), (64, 33, 2048), (3, 5, 4096), (7, 1, 384), (2, 3, 33)], ids=str)
    def test_norms(self, shape: tuple[int, ...], residual: torch.dtype) -> None:
        x, update = torch.randn(shape, device="cuda").to(residual), torch.randn(shape, device="cuda").bfloat16()
        weight = torch.rand(shape[-1], device="cuda").bfloat16() + 0.5
        options = (weight, 1e-5, torch.float32, torch.bfloat16)

        def summed() -> tuple[Tensor, ...]:
            fused = inference.add_rms_norm(x, update, *options)
            total = x + update.to(x.dtype)
            return (rms_norm(x, *options), *(fused or (total, rms_norm(total, *options))))

        same(summed, x)

    @pytest.mark.parametrize("ragged", [False, True])
    @pytest.mark.parametrize("shape", [(1, 32, 1, 64), (3, 33, 70, 64), (2, 4, 33, 128), (2, 6, 9, 80)], ids=str)
    def test_rotations(self, shape: tuple[int, ...], ragged: bool) -> None:
        batch, heads, rows, channels = shape
        x = torch.randn(batch, rows, heads, channels, device="cuda").bfloat16().transpose(1, 2)
        angles = torch.randn(batch if ragged else 1, rows, channels, device="cuda")
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        same(lambda: (rotate(x, cos, sin),), x, share=0.0)

    @pytest.mark.parametrize("shape", [(1, 1, 5632), (3, 5, 33), (64, 100, 5632)], ids=str)
    def test_gates(self, shape: tuple[int, ...]) -> None:
        gate, up = (3 * torch.randn(shape, device="cuda").bfloat16() for _ in range(2))

        def gated() -> tuple[Tensor]:
            found = inference.gated_silu(gate, up)
            return (F.silu(gate) * up if found is None else found,)

        same(gated, gate)

    def test_a_model_with_a_cache_of_fixed_size_uses_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(0)
        ours = twins(llama_config(), torch.bfloat16)[1].cuda()
        prompt = torch.randint(1, 61, (2, 9), device="cuda")
        launched = []
        kernels = inference._kernels
        monkeypatch.setattr(inference, "_kernels", lambda: launched.append(1) or kernels())

        def logits(static: bool) -> Tensor:
            cache = StaticCache(config=ours.config, max_cache_len=12) if static else None
            return ours(prompt, past_key_values=cache).logits.double()

        with torch.no_grad():
            plain = logits(static=False)
            assert not launched
            fused = logits(static=True)
            assert len(launched) == 2 * (1 + 1 + 2 + 1) + 1
        exact = twins_in_float64(ours)(prompt).logits
        assert (fused - exact).norm() < 1.3 * (plain - exact).norm()
        launched.clear()
        logits(static=True)  # with a gradient
        assert not launched
        ours.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: launched.append(0))
        with torch.no_grad():
            assert torch.equal(logits(static=True), fused)
        assert launched.count(0) == 1


def twins_in_float64(model: Any) -> Any:
    wide = twins(llama_config(), torch.float64)[1].cuda()
    wide.load_state_dict(model.state_dict())
    return wide


def same(compute: Any, x: Tensor, share: float = 0.01) -> None:
    """The kernels' numbers are those of plain operators but for a `share`, which is one unit in the last place off."""
    with torch.no_grad():
        expected = compute()
        with inference.inference_kernels(x):
            assert inference._device.get() == x.device
            found = compute()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype == torch.float32:
            assert torch.equal(a, b)
            continue
        ulps = (a.view(torch.int16).int() - b.view(torch.int16).int()).abs()
        assert float((ulps > 0).float().mean()) <= share
        assert int(ulps.max()) <= (2 if share else 0)
