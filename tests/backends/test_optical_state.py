"""What the optical backend remembers: ranges that follow the steps, and what random numbers are counted from."""

import math

import pytest
import torch
import torch.nn.functional as F

import backends
from backends.errors import UserError
from backends.layers import BackendLinear
from backends.optical import Optical
from tests.backends.contract import HEAD_DIM, HEADS, tensors


def optical(**options) -> Optical:
    return backends.load("optical", **options)


def linear_layer(**options) -> BackendLinear:
    layer = BackendLinear(6, 4)
    layer.set_backend(optical(**options))
    return layer


def test_ranges_start_unknown_and_combine_by_their_ends():
    specs = optical().linear_state(6, 4)
    assert list(specs) == ["x_min", "x_max", "w_min", "w_max", "out_min", "out_max", "step", "first_row", "layer"]
    assert all(specs[name].fill == math.inf and specs[name].reduce == "min" for name in specs if name.endswith("_min"))
    assert all(specs[name].fill == -math.inf and specs[name].reduce == "max" for name in specs if name.endswith("_max"))
    assert (specs["step"].dtype, specs["step"].reduce, specs["first_row"].given) == ("int64", "max", "first_row")
    assert list(optical().attention_state(HEADS, HEAD_DIM))[6:8] == ["scores_min", "scores_max"]


def test_quantiles_combine_by_their_mean():
    specs = optical(q_quantiles=(0.01, 0.99)).linear_state(6, 4)
    assert {specs[f"{tensor}_{end}"].reduce for tensor in ("x", "w", "out") for end in ("min", "max")} == {"mean"}


def test_ranges_follow_the_steps_as_a_plain_loop_says():
    layer = linear_layer(q_smooth_factor=0.8)
    expected = None
    for step in range(5):
        x = torch.randn(7, 6) * (step + 1)
        product = x @ layer.weight.detach().T
        if expected is not None:  # the operands of this step pass the ranges of the step before
            known = [torch.tensor(end) for end in expected]
            product = quantised(x, *known[:2]) @ lifted(quantised(layer.weight.detach(), *known[2:4]), *known[2:4]).T
        seen = [float(end) for t in (x, layer.weight.detach(), product) for end in (t.min(), t.max())]
        expected = seen if expected is None else [0.8 * a + 0.2 * b for a, b in zip(expected, seen, strict=True)]
        layer(x)
        got = [float(layer.get_buffer(f"{t}_{end}")) for t in ("x", "w", "out") for end in ("min", "max")]
        assert got == pytest.approx(expected, rel=1e-5)
        assert int(layer.step) == step + 1


def quantised(x, low, high):
    return ((x.clamp(low, high) - low) / (high - low + 1e-8) * 255).round() / 255 * (high - low) + low


def lifted(w, low, high):
    w = torch.where((w > 0) & (w < 0.020040 * high), 0.020040 * high, w)
    return torch.where((w < 0) & (w > 0.020040 * low), 0.020040 * low, w)


def test_the_first_step_passes_everything_through():
    layer = linear_layer()
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_the_range_of_results_grows_beyond_the_old_one():
    """It is seen before clamping: seen after, it could only shrink."""
    layer = linear_layer()
    x = torch.randn(5, 6)
    layer(x)
    before = float(layer.out_max), float(layer.out_min)
    for _ in range(60):
        layer(4 * x)
    assert float(layer.out_max) > 3 * before[0]
    assert float(layer.out_min) < 3 * before[1]


def test_evaluation_changes_nothing_and_gives_the_same_twice():
    layer = linear_layer()
    x = torch.randn(5, 6)
    layer(x)
    layer.eval()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    assert torch.equal(layer(3 * x), layer(3 * x))
    assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())


def test_evaluation_before_any_training_is_refused():
    layer = linear_layer().eval()
    with pytest.raises(UserError, match="not calibrated"):
        layer(torch.randn(5, 6))


def test_parts_of_a_batch_give_the_state_of_the_whole():
    """Minimum of the new lower ends, maximum of the upper ones: the average of the extremes of all rows."""
    backend, w = optical(), torch.randn(4, 6)
    state = tensors(backend.linear_state(6, 4))
    state |= backend.linear(torch.randn(8, 3, 6), w, None, state, training=True)[1]
    x = torch.randn(8, 3, 6) * 2
    whole = backend.linear(x, w, None, state, training=True)[1]
    for rows in (1, 2, 4):
        parts = [
            backend.linear(part, w, None, state | {"first_row": torch.tensor(rows * number)}, training=True)[1]
            for number, part in enumerate(x.split(rows))
        ]
        for name, spec in backend.linear_state(6, 4).items():
            if spec.given is None:
                stacked = torch.stack([part[name] for part in parts])
                combined = stacked.amin(0) if spec.reduce == "min" else stacked.amax(0)
                torch.testing.assert_close(combined, whole[name], rtol=1e-6, atol=0)


def test_quantile_ranges_cut_outliers():
    x = torch.randn(64, 6)
    x[0, 0] = 1000.0
    layer = linear_layer(q_quantiles=[0.01, 0.99])
    layer(x)
    expected = torch.quantile(x, torch.tensor([0.01, 0.99]))
    torch.testing.assert_close(torch.stack([layer.x_min, layer.x_max]), expected)
    assert layer.x_max < 10


def test_broken_numbers_reach_the_result_and_not_the_ranges():
    layer, x = linear_layer(), torch.randn(5, 6)
    layer(x)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    for broken in (math.nan, math.inf, -math.inf):
        bad = x.clone()
        bad[1, 2] = broken
        assert layer(bad).square().mean().isnan()
    assert layer.x_max == pytest.approx(float(before["x_max"]))
    assert all(buffer.isfinite() for buffer in layer.buffers())
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("span", [None, (0.01, 0.99)])
def test_an_input_without_rows_leaves_the_ranges_and_gives_weights_a_gradient_of_zeros(span):
    """An expert without tokens makes one."""
    layer = linear_layer(q_quantiles=span)
    names = [f"{tensor}_{end}" for tensor in ("x", "out") for end in ("min", "max")]
    for x in (torch.empty(0, 6), torch.randn(7, 6), torch.empty(2, 0, 6)):
        before = [layer.get_buffer(name).clone() for name in names]
        layer.zero_grad()
        y = layer(x)
        y.sum().backward()
        assert y.shape == (*x.shape[:-1], 4)
        if x.numel() == 0:
            assert [layer.get_buffer(name) for name in names] == before
            assert all(not parameter.grad.any() for parameter in layer.parameters())
    assert layer.eval()(torch.empty(0, 6)).shape == (0, 4)
    assert torch.isfinite(layer.eval()(torch.randn(3, 6))).all()
