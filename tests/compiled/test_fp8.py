"""fp8 products through the artifact: the numbers of an eager loop, and no second copy of a weight from forward to
backward."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InductorError
from torch._subclasses.fake_tensor import FakeTensorMode

from apps.training.eager_program import EagerProgram
from backends.fp8 import Fp8
from backends.layers import BackendLinear
from compiled import lowering
from compiled.capture import Captured, Sources, capture_stage
from compiled.lowering_products import store_fp8_operands_once
from compiled.stages import stage_of
from tests.compiled.conftest import Compile, Compiled


@pytest.fixture(scope="module")
def rounded(compile_step: Compile) -> Compiled:
    """Block linears and the head, with recomputed blocks; in float64 sums in another order round to the same fp8."""
    rules = ({"match": "*_proj", "use": "fp8"}, {"match": "lm_head", "use": "fp8", "scaling": "tensor"})
    return compile_step("model.dtype=float64", "run.recompute=block", "compile.head_chunks=1", rules=rules)


def test_losses_and_weights_follow_the_eager_twin_over_steps_of_two_microbatches(rounded: Compiled) -> None:
    ours, theirs = rounded.model(), rounded.model()
    program, twin = rounded.program(ours), EagerProgram(theirs, precision=rounded.plan.precision)
    for step in (1, 2, 3):
        batches = [rounded.batch(step, of=64), rounded.batch(step + 9, of=64)]
        hyper = rounded.hyperparameters(ours, step)
        result, expected = program.train_step(batches, hyper, 1.0), twin.train_step(batches, hyper, 1.0)
        assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-9)
        assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-8)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


class Pair(nn.Module):
    """Two layers that share their input, as q, k and v do."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = (BackendLinear(32, 64, bias=False, device="meta", dtype=dtype) for _ in range(2))
        for layer in (self.first, self.second):
            layer.set_backend(Fp8())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) * self.second(x)
        return y


class NormedPair(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def captured(dtype: torch.dtype, kind: type[Pair] = Pair) -> tuple[Captured, Captured]:
    pair = kind(dtype)
    stage = stage_of("", pair, {id(parameter): name for name, parameter in pair.named_parameters()}, {"": ""})
    made = Sources(FakeTensorMode(), torch.device("cpu"))
    with lowering.quiet_torch():
        forward, backward = capture_stage("pair", stage, {"x": made.empty((48, 32), dtype, True)}, made)
    assert backward is not None
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounded_weights_are_made_again_by_the_backward_and_their_scales_are_kept(dtype: torch.dtype) -> None:
    forward, backward = captured(dtype)
    assert {"first.weight", "second.weight"} <= {spec.name for spec in backward.spec.inputs}
    saved = [spec for spec in forward.spec.outputs if spec.name.startswith("saved_")]
    matrices = sorted((spec.shape, spec.dtype) for spec in saved if 1 not in spec.shape)
    # what the product of the two layers has to keep, and x in 8 bits
    name = str(dtype).removeprefix("torch.")
    assert matrices == [((32, 48), "float8_e4m3fn"), ((48, 64), name), ((48, 64), name)]


def test_an_input_that_layers_share_is_rounded_once() -> None:
    forward, backward = captured(torch.bfloat16)

    def rounded_to(region: Captured, dtype: torch.dtype) -> list[tuple[int, ...]]:
        values = [node.meta["val"] for node in region.graph.graph.nodes if dtype in node.args]
        return [tuple(value.shape) for value in values]

    x_and_x_turned, weights = [(48, 32)] * 2, [(64, 32)] * 2
    assert sorted(rounded_to(forward, torch.float8_e4m3fn)) == x_and_x_turned + weights
    assert rounded_to(backward, torch.float8_e4m3fn) == weights
    assert rounded_to(backward, torch.float8_e5m2) == [(48, 64)] * 4  # two gradients, and each under one scale


class Planned(Exception):
    """Raised when Inductor has planned its buffers, before anything becomes machine code."""


def test_an_operand_of_two_products_is_stored_once_and_in_8_bits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Inductor's plan, on a CPU, which has `_scaled_mm` too: x as it comes out of a normalisation."""
    with lowering.quiet_torch():
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

    monkeypatch.setattr("backends.kernels.fp8.has_fp8_products", lambda device: True)
    stored: list[str] = []

    def look(nodes: list[Any]) -> list[Any]:
        layouts = [node.node.get_layout() for node in nodes]
        stored.extend(str(layout.dtype) for layout in layouts if [int(each) for each in layout.size] == [48, 32])
        raise Planned

    forward, _ = captured(torch.bfloat16, NormedPair)
    given = [torch.randn(spec.shape, dtype=torch.bfloat16) for spec in forward.spec.inputs]
    store_fp8_operands_once()
    options = {"_pre_fusion_custom_pass": look, "force_disable_caches": True}
    stopped = pytest.raises(InductorError, match="Planned")
    with lowering.quiet_torch(), torch.no_grad(), config.patch(options), stopped:
        compile_fx(forward.graph, given)(*given)
    assert stored.count("torch.float8_e4m3fn") == 1, stored
