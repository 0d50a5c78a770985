import ast
import importlib
import inspect
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backends
import backends.kernels
from backends.errors import UserError
from backends.layers import BackendAttention
from backends.optical import Optical
from tests.backends.contract import HEAD_DIM, HEADS, attend, attention_operands, calibrated, tensors


def optical(**options) -> Optical:
    return backends.load("optical", **options)


# ---- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"q_levels": 1}, "q_levels is 1. Expected 2 to 65536."),
        ({"q_lut_min": 1.0}, "q_lut_min is 1.0. Expected from 0 to below 1, or null for none."),
        ({"q_lut_min": -0.1}, "q_lut_min is -0.1. Expected from 0 to below 1, or null for none."),
        ({"q_quantiles": [0.9, 0.1]}, "q_quantiles is (0.9, 0.1). Expected [low, high] with 0 <= low < high <= 1"),
        ({"q_smooth_factor": 1.0}, "q_smooth_factor is 1.0. Expected from 0 to below 1."),
        ({"q_init_seed": -1}, "q_init_seed is -1. Expected 0 to 2^63 - 1."),
        ({"dac_bits": 0}, "dac_bits is 0. Expected 1 to 16, or null for q_levels."),
        ({"adc_bits": 17}, "adc_bits is 17. Expected 1 to 16, or null for q_levels."),
        ({"photons_per_mac": 0}, "photons_per_mac is 0.0. Expected above 0, or null for no shot noise."),
        ({"photons_per_mac": math.nan}, "photons_per_mac is nan. Expected above 0, or null for no shot noise."),
        ({"q_level": 4}, "Unknown optical option 'q_level'. Did you mean 'q_levels'?"),
        ({"q_quantiles": [0.1]}, "Option 'q_quantiles' of backend 'optical' is [0.1] (list)."),
    ],
)
def test_an_option_out_of_bounds_is_one_line_that_says_what_fits(options, expected):
    with pytest.raises(UserError) as error:
        optical(**options)
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_converters_have_their_own_bits_or_the_common_levels():
    assert (optical().converters.input_levels, optical().converters.output_levels) == (256, 256)
    mixed = optical(q_levels=100, dac_bits=4).converters
    assert (mixed.input_levels, mixed.output_levels) == (16, 100)
    assert optical(adc_bits=10).converters.output_levels == 1024


def kernel_modules_used(module: str) -> set[str]:
    """backends.kernels modules that the source of `module` imports, at its top or inside a function."""
    used = set()
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(node, ast.ImportFrom):
            used |= {str(node.module), *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            used |= {name.name for name in node.names}
    files = Path(inspect.getfile(backends.kernels)).parent.glob("*.py")
    return used & {f"backends.kernels.{file.stem}" for file in files}


def test_the_fingerprint_covers_every_kernel_module_it_computes_with():
    reached, new = set(), kernel_modules_used("backends.optical")
    while new:
        reached |= new
        new = set().union(*(kernel_modules_used(module) for module in new)) - reached
    assert reached == set(Optical.source_modules)


# ---- bypass ------------------------------------------------------------------------------------------------------


def test_bypass_is_dense_and_keeps_no_state():
    plain, dense = optical(q_bypass=True), backends.load("dense")
    assert not plain.linear_state(6, 4)
    assert not plain.attention_state(HEADS, HEAD_DIM)
    x, w, b = torch.randn(3, 6), torch.randn(4, 6), torch.randn(4)
    assert torch.equal(plain.linear(x, w, b, {}, training=True)[0], F.linear(x, w, b))
    q, k, v = attention_operands()
    torch.testing.assert_close(attend(plain, q, k, v, {})[0], attend(dense, q, k, v, {})[0])
    assert torch.equal(plain.matmul(q, k.repeat_interleave(2, 1).mT, {})[0], q @ k.repeat_interleave(2, 1).mT)


# ---- attention ---------------------------------------------------------------------------------------------------


def test_attention_keeps_ten_ends_and_a_step():
    backend, (q, k, v) = optical(), attention_operands()
    state = calibrated(backend, q, k, v)
    assert state["q_max"] == q.max()
    assert state["v_min"] == v.min()
    assert int(state["step"]) == 1
    new = attend(backend, 2 * q, k, v, state, training=True)[1]
    assert float(new["q_max"]) == pytest.approx(0.9 * float(q.max()) + 0.1 * float(2 * q.max()))
    assert float(new["scores_max"]) > float(state["scores_max"])


def test_attention_after_calibration_is_near_the_plain_one_and_nearer_with_more_levels():
    q, k, v = attention_operands()
    exact = attend(backends.load("dense"), q, k, v, {})[0]
    errors = []
    for levels in (8, 64, 1024):
        backend = optical(q_levels=levels, q_lut_min=None)
        errors.append(float((attend(backend, q, k, v, calibrated(backend, q, k, v))[0] - exact).abs().mean()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_a_layer_with_attention_dithers_anew_each_step():
    layer = BackendAttention(HEADS, HEAD_DIM)
    layer.set_backend(optical(q_levels=16, q_smooth_factor=0.0))
    q, k, v = attention_operands()
    first, second, third = (layer.attend(q, k, v, mask=None, scale=HEAD_DIM**-0.5) for _ in range(3))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_equal_layers_round_independently():
    """Were their random numbers the same, the errors of all layers would be correlated, by half, and add up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64, bias=False), nn.Linear(8, 64, bias=False))
    backends.route(model, [{"match": "*", "use": "optical", "q_levels": 16, "q_lut_min": None}])
    x, errors = torch.randn(512, 8), []
    for layer in model:
        layer(x)
        infinite = {name: torch.tensor(math.inf) for name in ("out_min", "out_max")}
        exact = layer.backend.linear(x, layer.weight, None, dict(layer.named_buffers()) | infinite)[0]
        errors.append((layer(x) - exact).flatten().double().detach())
    correlation = torch.corrcoef(torch.stack(errors))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(errors[0]))


# ---- programs ----------------------------------------------------------------------------------------------------


def assert_compiles_to_the_same(compute, leaves, state):
    """The forward, its state and its backward are one graph each, and give what eager gives."""
    y, new_state = torch.compile(compute, fullgraph=True, backend="aot_eager")(*leaves, state)
    expected, expected_state = compute(*leaves, state)
    torch.testing.assert_close((y, new_state), (expected, expected_state))
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, leaves, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.slow
# torch's own tracer of autograd functions raises it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"photons_per_mac": 50.0, "q_quantiles": [0.01, 0.99]}])
def test_torch_compile_gives_what_eager_gives(options):
    backend, x, w = optical(**options), torch.randn(5, 6), torch.randn(4, 6)
    state = tensors(backend.linear_state(6, 4))
    state |= backend.linear(x, w, None, state, training=True)[1]
    leaves = (x.requires_grad_(), w.requires_grad_())
    assert_compiles_to_the_same(lambda x, w, s: backend.linear(x, w, None, s, training=True), leaves, state)
    q, k, v = attention_operands()
    state = calibrated(backend, q, k, v)
    leaves = tuple(operand.requires_grad_() for operand in (q, k, v))
    assert_compiles_to_the_same(lambda q, k, v, s: attend(backend, q, k, v, s, training=True), leaves, state)


# ---- cost --------------------------------------------------------------------------------------------------------


def test_cost_has_joules_unless_bypassed():
    assert optical().cost(4, 8, 2).joules > 0
    assert optical(q_bypass=True).cost(4, 8, 2).joules is None
    assert optical().cost(4, 8, 2).flops == 2 * 4 * 8 * 2
    assert optical(adc_bits=12).cost(4, 8, 2).joules > optical(adc_bits=8).cost(4, 8, 2).joules


def test_the_energy_estimate_comes_with_its_constants_and_their_sources() -> None:
    constants = backends.load("optical").cost_constants()
    assert {name for name, _, _ in constants} >= {"wavelength", "adc_per_level", "memory_per_bit", "digital_mac"}
    assert all("assumption" in source or any(year in source for year in ("2014", "2302")) for _, _, source in constants)
    assert backends.load("optical", q_bypass=True).cost_constants() == []
